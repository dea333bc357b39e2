"""C++ kernels on the CPU: the bits of the reference codecs, at the speed of memory."""

import math
from functools import partial

import torch

from ... import formats
from ..._backends import native
from ..._backends.native import DTYPE_CODES, lib, pointer, threads
from ...formats import Spec, code_book
from ...formats.base import check_finite, from_parts
from ...formats.dynamic_map import dynamic_map, kernel_tables
from . import grid

# csrc/cpu/quantize.h: how one element is held in a byte, and what a quantizer found.
CODES = {"int8": 0, "fp8": 1, "fp8_e5m2": 2, "fp8_240": 3, "fp8_e3m4": 4}
INTS = {"int4": 4, "int3": 3, "int2": 2}
BOOKS = {"nf4": 0, "fp4": 1}
NONFINITE, SCALE_OVERFLOW = 1, 2


def why_not_quantize(x, format, *spec) -> str | None:
    return native.why_not(x)


def why_not_dequantize(qdata, *rest) -> str | None:
    return native.why_not(qdata, *(t for t in rest if isinstance(t, torch.Tensor)))


def quantize(x: torch.Tensor, format: str, *spec) -> list[torch.Tensor]:
    spec, x = Spec(*spec), x.contiguous()
    layout = formats.get(format).layout(x.shape, spec)
    out = {name: native.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
    if x.numel() == 0:
        return list(formats.get(format).encode(x.float(), spec).values())
    status = _ENCODERS[format](x, spec, out)
    if status == NONFINITE:
        check_finite(x)
    if status == SCALE_OVERFLOW:
        formats.get(format).encode(x.float(), spec)  # which words the refusal
    return list(out.values())


def dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype) -> torch.Tensor:  # fmt: skip
    out = native.empty(shape, dtype)
    tensors = (qdata, scale, zero_point, nested_scale, scale_offset)
    tensors = [None if t is None else t.contiguous() for t in tensors]
    # The kernels trust the sizes that they are given.
    from_parts(*tensors, format, group_size, out.shape, dtype).check()
    if out.numel():
        _DECODERS[format](*tensors, format, group_size, out)
    return out


def why_not_searched(x, importance, *rest) -> str | None:
    return native.why_not(x, importance)


def searched(x, importance, *rest) -> list[torch.Tensor]:
    check_finite(x)
    return grid.searched(x, importance, *rest)


def _tiles(shape: tuple[int, ...], format: str, group_size: int) -> tuple[int, ...]:
    """batch, rows, cols, row_block, col_block, code, threads of csrc/cpu/quantize.h ScaledArgs."""
    *lead, cols = shape
    row_block, col_block = {0: (0, 0), -1: (1, cols), -128: (1, 128)}.get(
        group_size, (group_size, group_size)
    )
    rows = lead[-1] if lead else 1
    batch = math.prod(lead[:-1])
    return batch, rows, cols, row_block, col_block, CODES[format], threads()


def _quantize_scaled(x: torch.Tensor, spec: Spec, out: dict, format: str) -> int:
    return lib().quantize_scaled(*_tiles(x.shape, format, spec.group_size), pointer(x),
                                 DTYPE_CODES[x.dtype], pointer(out["qdata"]),
                                 pointer(out["scale"]), spec.allow_nonfinite)  # fmt: skip


def _dequantize_scaled(qdata, scale, zero_point, nested, offset, format, group_size, out) -> None:
    lib().dequantize_scaled(*_tiles(out.shape, format, group_size), pointer(qdata), pointer(scale),
                            pointer(out), DTYPE_CODES[out.dtype])  # fmt: skip


def _quantize_book(x: torch.Tensor, spec: Spec, out: dict, book: int) -> int:
    blocks = -(-x.numel() // spec.group_size)
    absmax = torch.empty(blocks) if spec.double_quant else out["scale"]
    status = lib().quantize_book(book, pointer(x), DTYPE_CODES[x.dtype], x.numel(),
                                 spec.group_size, pointer(out["qdata"]), pointer(absmax),
                                 threads())  # fmt: skip
    if spec.double_quant and not status:
        # torch's own mean, in the order of summation that the reference has.
        out["scale_offset"] = code_book.mean(absmax)
        _dynamic_codes(absmax, out["scale_offset"], code_book.NESTED_BLOCK, out["scale"],
                       out["nested_scale"])  # fmt: skip
    return status


def _dynamic_codes(x, offset, block, codes, absmax) -> int:
    _, bound, start = kernel_tables()
    return lib().quantize_dynamic(pointer(x), DTYPE_CODES[x.dtype], pointer(offset), x.numel(),
                                  block, pointer(bound), pointer(start), pointer(codes),
                                  pointer(absmax), threads())  # fmt: skip


def _quantize_dynamic8(x: torch.Tensor, spec: Spec, out: dict) -> int:
    return _dynamic_codes(x, None, spec.group_size, out["qdata"], out["scale"])


def _dequantize_dynamic8(qdata, scale, zero_point, nested, offset, format, group, out) -> None:
    lib().dequantize_dynamic(pointer(qdata), pointer(scale), out.numel(), group,
                             pointer(dynamic_map()), pointer(out), DTYPE_CODES[out.dtype],
                             threads())  # fmt: skip


def _dequantize_book(qdata, scale, zero_point, nested, offset, format, group_size, out) -> None:
    lib().dequantize_book(BOOKS[format], pointer(qdata), pointer(scale), pointer(nested),
                          pointer(offset), pointer(dynamic_map()), out.numel(), group_size,
                          pointer(out), DTYPE_CODES[out.dtype], threads())  # fmt: skip


def _groups(bits: int, shape: tuple[int, ...], group_size: int,
            scale_dtype: torch.dtype) -> tuple[int, ...]:  # fmt: skip
    """bits, rows, cols, group, scale_dtype, threads of csrc/cpu/quantize.h GroupArgs."""
    *lead, cols = shape
    group = cols if group_size == -1 else group_size
    return bits, math.prod(lead), cols, group, DTYPE_CODES[scale_dtype], threads()


def _quantize_groups(x: torch.Tensor, spec: Spec, out: dict, bits: int) -> int:
    return lib().quantize_groups(*_groups(bits, x.shape, spec.group_size, spec.scale_dtype),
                                 pointer(x), DTYPE_CODES[x.dtype], pointer(out["qdata"]),
                                 pointer(out["scale"]), pointer(out.get("zero_point")))  # fmt: skip


def _dequantize_groups(qdata, scale, zero_point, nested, offset, format, group_size, out) -> None:
    lib().dequantize_groups(*_groups(INTS[format], out.shape, group_size, scale.dtype),
                            pointer(qdata), pointer(scale), pointer(zero_point), pointer(out),
                            DTYPE_CODES[out.dtype])  # fmt: skip


def _encoder(format: str):
    return lambda x, spec, out: _quantize_scaled(x, spec, out, format)


_ENCODERS = {name: _encoder(name) for name in CODES} | {
    **{name: partial(_quantize_book, book=book) for name, book in BOOKS.items()},
    **{name: partial(_quantize_groups, bits=bits) for name, bits in INTS.items()},
    "dynamic8": _quantize_dynamic8,
}
_DECODERS = dict.fromkeys(CODES, _dequantize_scaled) | {
    **dict.fromkeys(BOOKS, _dequantize_book),
    **dict.fromkeys(INTS, _dequantize_groups),
    "dynamic8": _dequantize_dynamic8,
}
