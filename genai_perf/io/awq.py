"""The AWQ dialect in its "gemm" layout: int4 weights with zero points, packed along the output.

For a linear layer P of shape (N, K), groups of g:
    P.qweight  int32 (K, N/8)     code of (k, n) in nibble ORDER.index(n mod 8) of word n / 8
    P.qzeros   int32 (K/g, N/8)   zero points, packed alike; absent: 8
    P.scales   fp16 (K/g, N)

w[n, k] = scales[k / g, n] * (code - zero). Source: AutoAWQ 0.2.9, `awq/utils/packing_utils.py`.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from .._errors import CheckpointError
from ..formats import QuantizedTensor
from ..formats.base import FLOATS
from ..formats.int4 import pack, unpack
from .checkpoints import CONFIG, Checkpoint
from .packing import expect, half_scales, row_bytes, transposed, words
from .stored import Stored

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each nibble of a word, from the lowest
_BACK = tuple(ORDER.index(i) for i in range(8))
_PARTS = ("qweight", "qzeros", "scales")


def encode(name: str, qt: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that stand for the weight of the linear layer `name`.

    Args:
        name: the module's full name.
        qt: int4 weight (N, K), symmetric or not.

    Raises:
        CheckpointError: another format, sizes that do not pack, scales that fp16 and bf16 lack.
    """
    if qt.format != "int4" or len(qt.shape) != 2:
        raise CheckpointError(f"{name}: {METHOD} holds int4 weights, got {qt.format}")
    n, k = qt.shape
    group = k if qt.group_size == -1 else qt.group_size
    if n % 8 or k % group:
        raise CheckpointError(f"{name}: {METHOD} needs a multiple of 8 rows and groups that divide "
                              f"the columns, got {n} x {k}, groups of {group}")  # fmt: skip
    zero = torch.full((n, k // group), 8, dtype=torch.uint8)
    zero = zero if qt.zero_point is None else qt.zero_point
    return {
        f"{name}.qweight": _pack(transposed(unpack(qt.qdata, k))),
        f"{name}.qzeros": _pack(transposed(zero)),
        f"{name}.scales": transposed(half_scales(name, qt.scale, METHOD)),
    }


def _pack(codes: torch.Tensor) -> torch.Tensor:
    return words(pack(codes.unflatten(1, (-1, 8))[..., ORDER].flatten(1)))


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    codes = unpack(row_bytes(packed), 8 * packed.shape[1])
    return codes.unflatten(1, (-1, 8))[..., _BACK].flatten(1)


def find(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The quantized linear layers of a checkpoint in this dialect.

    Raises:
        CheckpointError: another layout than "gemm", or other than 4 bits.
    """
    config, file = checkpoint.quantization, checkpoint.path / CONFIG
    # Old files say w_bit, q_group_size.
    bits = config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not isinstance(group, int):
        raise CheckpointError(f"{file}: {METHOD} of {bits} bits in groups of {group}, version "
                              f"{version!r} is not supported")  # fmt: skip
    found = {}
    for key in checkpoint.names():
        if key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            keys = (f"{name}.{part}" for part in _PARTS)
            keys = tuple(k for k in keys if not k.endswith(".qzeros") or k in checkpoint)
            found[name] = Stored(keys, partial(decode, name, group_size=group))
    return found


def decode(name: str, tensors: Mapping[str, torch.Tensor], *,
           group_size: int) -> QuantizedTensor:  # fmt: skip
    """The weight of the linear layer `name`, from the tensors that `encode` describes.

    Args:
        name: the module's full name.
        tensors: `<name>.qweight`, `.scales` and, where it is there, `.qzeros`.
        group_size: inputs that share a scale; -1: all.

    Raises:
        CheckpointError: shapes that do not agree.
    """
    codes, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
    if codes.dim() != 2:
        raise CheckpointError(f"{name}.qweight: must be 2-d, got {list(codes.shape)}")
    k, n = codes.shape[0], 8 * codes.shape[1]
    groups = 1 if group_size == -1 else -(-k // group_size)
    expect(f"{name}.qweight", codes, (torch.int32,), (k, n // 8))
    expect(f"{name}.scales", scales, FLOATS, (groups, n))
    zero = tensors.get(f"{name}.qzeros")
    if zero is not None:
        expect(f"{name}.qzeros", zero, (torch.int32,), (groups, n // 8))
        zero = transposed(_unpack(zero))
        zero = zero if bool((zero != 8).any()) else None
    qt = QuantizedTensor("int4", torch.Size((n, k)), scales.dtype, pack(transposed(_unpack(codes))),
                         transposed(scales), zero, group_size=group_size)  # fmt: skip
    qt.check(f"{name}.qweight: ")
    return qt


def quantization_config(*, group_size: int, skip: Iterable[str] = ()) -> dict:
    """The `quantization_config` of config.json.

    Args:
        group_size: of all quantized layers.
        skip: names of the linear layers that are not quantized.
    """
    return {
        "quant_method": METHOD,
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(skip) or None,
    }
