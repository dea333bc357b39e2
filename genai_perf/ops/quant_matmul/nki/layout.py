"""Any QuantizedTensor as what the kernels read: rows of whole bytes, scales by row and group.

A view where rows hold whole groups, which weights of models do; else a copy, made for the call.
"""

import torch

from ....formats import QuantizedTensor, get
from ....formats.int4 import unpack
from ....formats.nf4 import block_scales, code_book

CHUNK = 512  # the least that the kernels decode of a row: groups must divide it, or be divided


def describe(weight: tuple, format: str, group_size: int, n: int, k: int) -> tuple:
    """(codes, scale, zero_point, table, form) of a weight (n, k); see tiles.decode_tile."""
    qdata, scale, zero, nested, offset = weight
    if format == "int8":
        return _form(qdata, scale, None, None, 8, False, k)
    if format.startswith("fp8"):
        code_dtype = get(format).code_dtype
        bytes_ = torch.arange(256, dtype=torch.int32, device=qdata.device).to(torch.uint8)
        table = bytes_.view(code_dtype).float()[None]
        codes = qdata.view(torch.uint8)
        scale = scale.float()
        if group_size == 128:
            scale = scale.repeat_interleave(128, 0)[:n]
        return _form(codes, scale.expand(n, -1), None, table, 8, False,
                     128 if group_size == 128 else k)  # fmt: skip
    if format == "nf4":
        qt = QuantizedTensor(format, torch.Size((n, k)), torch.float32, qdata, scale, zero,
                             group_size, nested, offset)  # fmt: skip
        scales, table = block_scales(qt), code_book(qdata.device)[None]
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
