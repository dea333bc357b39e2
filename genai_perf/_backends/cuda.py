"""The CUDA toolchain as torch sees it."""

import torch


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None
