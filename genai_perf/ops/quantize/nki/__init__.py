"""Quantizers on Trainium by NKI kernels: int8 and nf4 with the bits of the reference, fp8_240 with
its scales and its codes but where x / scale is rounded to a tie."""

import math

import torch

from .... import formats
from ...._backends import nki as toolchain
from ....formats import Spec
from ....formats.base import check_finite, from_parts

FP8_MAX = 240.0


def why_not_quantize(x, format, *spec) -> str | None:
    if (reason := toolchain.why_not(x)) is not None:
        return reason
    spec = Spec(*spec)
    if format == "int8":
        return None
    if format == "fp8_240":
        rows = spec.group_size == -1 and not spec.allow_nonfinite
        return None if rows else "nki takes fp8_240 by row, finite"
    if format != "nf4":
        return f"nki quantizes int8, fp8_240 and nf4, got {format}"
    if spec.double_quant:
        return "nki does not quantize the scales of nf4"
    if x.numel() % spec.group_size:
        return f"nki takes whole blocks of {spec.group_size}, got {x.numel()} elements"
    return None


def why_not_dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size,
                       *rest) -> str | None:  # fmt: skip
    if (reason := toolchain.why_not(qdata, scale)) is not None:
        return reason
    if format in ("fp8_240", "fp8_e5m2"):
        return None if group_size == -1 else f"nki takes {format} by row"
    taken = ("int8", "nf4")
    return None if format in taken else f"nki dequantizes int8, nf4 and fp8_240, got {format}"


def quantize(x, format, *spec):
    spec = Spec(*spec)
    check_finite(x)
    if x.numel() == 0:
        return list(formats.get(format).encode(x.float(), spec).values())
    if format == "int8":
        codes, absmax = quantize_rows(x.reshape(-1, x.shape[-1]))
        return [codes.view(x.shape), absmax.view(*x.shape[:-1], 1) / 127.0]
    if format == "fp8_240":
        codes, absmax = quantize_rows(x.reshape(-1, x.shape[-1]), fp8=True)
        scale = (absmax.view(*x.shape[:-1], 1) / FP8_MAX).clamp(min=formats.base.SCALE_FLOOR)
        return [codes.view(x.shape), scale]
    from .kernels import nf4_quantize

    blocks = x.reshape(-1, spec.group_size)
    together = next(n for n in (16, 8, 4, 2, 1) if blocks.shape[0] % n == 0)
    codes, absmax = toolchain.launch(
        nf4_quantize, blocks.view(-1, together * spec.group_size), formats.nf4.code_book()[None],
        spec.group_size,
    )  # fmt: skip
    return [codes.view(-1), absmax.view(-1)]


def quantize_rows(x, gamma=None, *, fp8: bool = False, eps: float = 1e-6):
    """(codes, absmax) of the rows of x (R, K), each by its absmax; RMS-normalised first by gamma.

    Args:
        x: (R, K) fp32, bf16 or fp16.
        gamma: (K,) the norm's weight, or None for no norm; eps: the norm's.
        fp8: e4m3 codes up to 240, what trn2 has, in float8_e4m3fn; else int8.

    Returns: codes (R, K), absmax fp32 (R, 1); the scale is absmax / 127, or / 240.
    """
    from .kernels import rows_quantize

    weight = x.new_zeros(1, 1, dtype=torch.float32) if gamma is None else gamma.float()[None]
    return toolchain.launch(rows_quantize, x, weight, gamma is not None, eps, fp8)


def dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype):  # fmt: skip
    qt = from_parts(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
                    dtype)  # fmt: skip
    qt.check()
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    from .kernels import rows_dequantize

    table = formats.nf4.code_book(qdata.device)[None]
    example = torch.empty(1, 1, dtype=dtype)
    if format != "nf4":
        rows, scales, groups = qt.qdata.reshape(-1, shape[-1]), scale.reshape(-1, 1), 0
    else:  # each block a row of bytes
        rows = torch.nn.functional.pad(qdata, (0, -len(qdata) % (group_size // 2)))
        rows, groups = rows.view(-1, group_size // 2), 1
        scales = formats.code_book.block_scales(qt)[:, None]
    out = toolchain.launch(rows_dequantize, rows, scales, table, groups == 1, example)
    return out.reshape(-1)[:count].view(shape)
