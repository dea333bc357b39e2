"""Triton: whether it is here, on which device, and launching a kernel; knows no op.

Where TRITON_INTERPRET is set, kernels run in Triton's interpreter, on CPU tensors too: exact and
slow, a test of the kernels and not a way to use them.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from .._config import CONFIG
from . import tuning


def interpreting() -> bool:
    return CONFIG.triton_interpret


@cache
def unavailable() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "triton sees no GPU (torch.cuda.is_available() is False)"
    return None


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Why no Triton kernel can take these tensors, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cuda" and not interpreting():
            return f"triton needs CUDA tensors, got {tensor.device}"
    if (reason := unavailable()) is not None:
        return reason
    device = tensors[0].device
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"triton kernels need compute capability 8.0, got {major}.{minor}"
    return None


@cache
def version() -> str:
    return import_module("triton").__version__


@cache
def arch(device: torch.device) -> str:
    """`sm_90`, `gfx942`, or `interpreter`."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def device_key(device: torch.device) -> str:
    """The name that tuned tables go by, such as `nvidia-h200`."""
    if device.type != "cuda":
        return arch(device)
    return "-".join(torch.cuda.get_device_name(device).lower().split())


@cache
def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**20
    return torch.cuda.get_device_properties(device).L2_cache_size


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel, programs: int, device: torch.device, *args, **constants) -> None:
    """Run `programs` programs on the device's current stream."""
    if device.type != "cuda":
        import_module(f"{__package__}.triton_interpreter").correct()
        kernel[(programs,)](*args, **constants)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **constants)


def measured(folder: Path, device: torch.device, exact: Mapping[str, object],
             near: Mapping[str, float]) -> dict[str, int] | None:  # fmt: skip
    """What was measured on this kind of device (see `tuning.lookup`), None where nothing was."""
    if device.type != "cuda":
        return None
    return tuning.lookup(folder, device_key(device), version(), exact, near)
