"""Any QuantizedTensor as what the kernels read: rows of whole bytes, scales by row and group.

A view where rows hold whole groups, which weights of models do; else a copy, made for the call.
"""

import torch

from ....formats import QuantizedTensor, get
from ....formats.code_book import block_scales
from ....formats.int4 import unpack
from ....formats.nf4 import code_book

PARTITIONS = 128
HALVES = (torch.bfloat16, torch.float16)
CHUNK = 512  # the least that the kernels decode of a row: groups must divide it, or be divided


def describe(weight: tuple, format: str, group_size: int, n: int, k: int) -> tuple:
    """(codes, scale, zero_point, table, form) of a weight (n, k); see tiles.decode_tile."""
    qdata, scale, zero, _, _ = weight
    if format == "int8":
        return _form(qdata, scale, None, None, 8, False, k)
    if format.startswith("fp8"):
        table = _fp8_values(format, qdata.device).float()[None]
        codes = qdata.view(torch.uint8)
        return _form(codes, _fp8_scale(scale, group_size, n), None, table, 8, False,
                     128 if group_size == 128 else k)  # fmt: skip
    if format == "nf4":
        scales, table = _nf4_scale(weight, group_size, n, k), code_book(qdata.device)[None]
        if k % group_size == 0:
            return _form(
                qdata.view(n, k // 2), scales.view(n, -1), None, table, 4, True, group_size
            )
        codes = torch.stack([qdata >> 4, qdata & 15], 1).view(-1)[: n * k].view(n, k)
        return _form(codes, scales.repeat_interleave(group_size)[: n * k].view(n, k), None, table,
                     8, False, 1)  # fmt: skip
    share = k if group_size == -1 else group_size
    zero = torch.full_like(scale, 8, dtype=torch.float32) if zero is None else zero.float()
    if k % 2:
        qdata = unpack(qdata, k)
    return _form(qdata, scale.float(), zero, None, 8 if k % 2 else 4, False, share)


def _fp8_values(format: str, device) -> torch.Tensor:
    """What each of the 256 bytes is."""
    codes = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    return codes.view(get(format).code_dtype)


def _fp8_scale(scale, group_size: int, n: int) -> torch.Tensor:
    """(n, groups): a row's scale, or those of its blocks."""
    scale = scale.float()
    return (scale.repeat_interleave(128, 0)[:n] if group_size == 128 else scale).expand(n, -1)


def _nf4_scale(weight: tuple, group_size: int, n: int, k: int) -> torch.Tensor:
    qdata, scale, zero, nested, offset = weight
    return block_scales(QuantizedTensor("nf4", torch.Size((n, k)), torch.float32, qdata, scale,
                                        zero, group_size, nested, offset))  # fmt: skip


def words(weight: tuple, format: str, group_size: int, n: int, k: int, m: int, dtype):
    """(words, scale, zero_point, table, code, per, share, zero) of words_kernel for m rows of x in
    `dtype`; None where a group is no whole number of words, or there are too many rows."""
    qdata, scale, zero, _, _ = weight
    per = 4 if format in ("nf4", "int4") else 2
    share = k if group_size in (0, -1) or format == "int8" else group_size
    chunk = PARTITIONS * per
    together = share >= k or chunk % share == 0 or share % chunk == 0
    inside = 1 if share >= k else max(1, chunk // share)
    if (dtype not in HALVES or format == "int8" or k % per or not together
            or (share < k and share % per) or (inside > 1 and m * inside > 2 * CHUNK)):  # fmt: skip
        return None
    if format == "nf4" and k % group_size:
        return None
    code, shift = format, "none"
    table = torch.zeros(1, 256, device=qdata.device, dtype=torch.uint32)
    if format == "nf4":
        scale, code = _nf4_scale(weight, group_size, n, k).view(n, -1), "table4"
        book = code_book(qdata.device)
        table = _pairs(torch.stack([book.repeat_interleave(16), book.repeat(16)], 1).to(dtype))
    elif format == "int4":
        shift = 8.0 if zero is None else "tensor"
    else:
        scale, code = _fp8_scale(scale, group_size, n), FP8_CODES[format]
    scale = scale.float().contiguous()
    zero = scale[:1, :1] if zero is None else zero.float()
    stored = qdata.contiguous().view(n, -1).view(torch.uint16)
    return stored, scale, zero.contiguous(), table, code, per, share, shift


# Codes above 240 are none of trn2's: "fp8" goes in as two numbers there (see words_tiles).
FP8_CODES = {"fp8": "fp8", "fp8_240": "e4m3", "fp8_e5m2": "e5m2"}


def _pairs(values: torch.Tensor) -> torch.Tensor:
    """(256, 2) of a 16-bit type as (1, 256) words, the first in the low half."""
    return values.contiguous().view(torch.int32).view(torch.uint32).view(1, 256)


def _form(codes, scale, zero, table, bits, high_first, share) -> tuple:
    k = codes.shape[1] * 8 // bits
    uses_table = table is not None
    table = codes.new_zeros(1, 16, dtype=torch.float32) if table is None else table
    if share >= k:  # one scale a row: for any chunk of it
        share = 0
    elif k % share or CHUNK % share:
        # By element: a last group that is shorter, or groups that no chunk is a multiple of.
        scale = scale.repeat_interleave(share, 1)[:, :k]
        zero = None if zero is None else zero.repeat_interleave(share, 1)[:, :k]
        share = 1
    has_zero = zero is not None
    zero = scale.new_zeros(1, 1) if zero is None else zero
    form = (bits, high_first, share, uses_table, has_zero)
    return codes, scale.contiguous(), zero.contiguous(), table, form


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """The last dimension filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple))
