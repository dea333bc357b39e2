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
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        return f"cuda needs all tensors on one CUDA device, got {found}"
    return unavailable() or _too_old(devices.pop()) or _load()[1]


@cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"cuda needs a device of sm_80 or newer, got sm_{major}{minor}"


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """(device number, stream) of a kernel that works on `tensor`: torch's current stream."""
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream


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
