"""The CUDA toolchain: torch's device, and our own kernels, in a library loaded when needed."""

import ctypes
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Why no CUDA kernel of ours can take these tensors, or None."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) != 1 or not next(iter(devices)).startswith("cuda"):
        return f"cuda needs all tensors on one CUDA device, got {', '.join(sorted(devices))}"
    return unavailable() or _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not LIBRARY.exists():
        return None, "the CUDA kernels are not built (no nvcc was found at build time)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"the CUDA kernels do not load ({error})"
    library.gp_cuda_error.restype = ctypes.c_char_p
    return library, None


@cache
def kernel(name: str, *argtypes: type) -> ctypes._CFuncPtr:
    """The C function `name` of the library, which returns a cudaError_t; only call it where
    `why_not` gave None."""
    library, reason = _load()
    if library is None:
        raise ImportError(reason)
    function = getattr(library, name)
    function.argtypes, function.restype = argtypes, ctypes.c_int
    return function


def check(error: int) -> None:
    """Raises RuntimeError with CUDA's own words unless `error` is success."""
    if error:
        raise RuntimeError(f"CUDA: {_load()[0].gp_cuda_error(error).decode()}")
