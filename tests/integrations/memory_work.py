"""What the memory test runs, each in a process of its own."""

from pathlib import Path

import torch

import genai_perf as gp


def compress(src: str, dst: str) -> int:
    """Bytes of the layer inputs that calibration holds."""
    torch.set_num_threads(1)
    ids = torch.arange(128).view(2, 64) % 64
    gp.compress(Path(src), Path(dst), "int8-rtn", calibration=ids)
    return ids.numel() * 512 * 4


def held_out(src: str, dst: str) -> None:
    torch.set_num_threads(1)
    ids = torch.arange(4 * 256).view(4, 256)
    gp.compress(Path(src), Path(dst), "int8-rtn", heldout=ids)
