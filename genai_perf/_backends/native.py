"""The native C++ extension: loading it, addresses, dtype codes and thread count."""

from functools import cache
from types import ModuleType

import torch

from .._config import CONFIG

# csrc/common/dtype.h holds the same numbers.
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.int8: 5,
}


# From here on the C library maps an allocation afresh, with every page to be faulted in again.
HUGE_BYTES = 4 << 20


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from .. import _C
    except ImportError as error:
        return None, f"the native extension is not built ({error}); run `pip install -e .`"
    if CONFIG.isa:
        _C.force_isa(CONFIG.isa)
    _C.use_openmp_of("libtorch_cpu.so")  # kernels share torch's threads; else they have their own
    return _C, None


def unavailable() -> str | None:
    return _load()[1]


def lib() -> ModuleType:
    """The extension module; only call it where `why_not` gave None."""
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Why no native kernel can take these tensors, or None."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return f"native needs CPU tensors, got {tensor.device}"
    return unavailable()


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor to be written at once: a large one on huge pages, which fault 512 times less."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= HUGE_BYTES:
        lib().prefer_huge_pages(out.data_ptr(), out.nbytes)
    return out


def gather(tensor: torch.Tensor | None) -> None:
    """Puts a large tensor that is to be read often into huge pages, unless processes share it."""
    if tensor is not None and tensor.nbytes >= HUGE_BYTES and not tensor.is_shared():
        lib().gather_huge_pages(tensor.data_ptr(), tensor.nbytes)


def threads() -> int:
    return torch.get_num_threads()
