"""The GPTQ dialect: int4 and int8 weights, packed along the input.

For a linear layer P of shape (N, K), b bits, groups of g:
    P.qweight  int32 (K*b/32, N)   code of (k, n) at bits b*(k mod 32/b) of word k*b/32
    P.qzeros   int32 (K/g, N*b/32) zero points, packed along N
    P.scales   fp16 (K/g, N)
    P.g_idx    int32 (K)           the group of each input

w[n, k] = scales[g_idx[k], n] * (code - zero). Version 1 (`checkpoint_format: gptq`) stores
zero - 1, version 2 (`gptq_v2`) the zero itself. Written by default: version 1, symmetric (zero 8 or
128), which every server reads; an asymmetric zero of 0 cannot be stored in version 1.
Source: GPTQModel 7.7, `nn_modules/qlinear`; AutoGPTQ pull request 325 on the zero.
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

METHOD = "gptq"
QUANTIZE_CONFIG = "quantize_config.json"  # where old loaders look
_BITS = {"int4": 4, "int8": 8}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def encode(name: str, qt: QuantizedTensor, version: int = 1) -> dict[str, torch.Tensor]:
    """The tensors that stand for the weight of the linear layer `name`.

    Args:
        name: the module's full name.
        qt: int4 or int8 weight (N, K); symmetric under version 1.
        version: 1, or 2, whose zero points are stored as they are.

    Raises:
        CheckpointError: what this dialect cannot hold without loss: another format, asymmetric
            groups under version 1, sizes that do not pack, scales that fp16 and bf16 lack.
    """
    bits = _BITS.get(qt.format)
    if bits is None or (qt.zero_point is not None and version == 1) or len(qt.shape) != 2:
        what = qt.format if bits is None else f"asymmetric {qt.format}"
        raise CheckpointError(f"{name}: {METHOD} holds symmetric int4 and int8 weights (version 2: "
                              f"also asymmetric int4), got {what}")  # fmt: skip
    n, k = qt.shape
    group = k if qt.group_size == -1 else qt.group_size
    per_word = 32 // bits
    for size, what in ((n % per_word, f"a multiple of {per_word} rows"),
                       (k % per_word, f"a multiple of {per_word} columns"),
                       (k % group, f"a group size that divides its {k} columns")):  # fmt: skip
        if size:
            raise CheckpointError(
                f"{name}: {METHOD} needs {what}, got {n} x {k}, groups of {group}"
            )
    row = qt.qdata if bits == 4 else qt.qdata.view(torch.uint8) ^ 128
    if qt.zero_point is not None:
        zeros = words(pack(transposed(qt.zero_point)))
    else:
        zero = (0x88 if bits == 4 else 0x80) - (0x11 if bits == 4 else 0x01) * (version == 1)
        whole = int.from_bytes(bytes([zero] * 4), "little", signed=True)
        zeros = torch.full((k // group, n // per_word), whole, dtype=torch.int32)
    return {
        f"{name}.qweight": transposed(words(row)),
        f"{name}.qzeros": zeros,
        f"{name}.scales": transposed(half_scales(name, qt.scale, METHOD)),
        f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // group,
    }


def find(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The quantized linear layers of a checkpoint in this dialect."""
    config, file = checkpoint.quantization, checkpoint.path / CONFIG
    bits, group, symmetric = (config.get(key) for key in ("bits", "group_size", "sym"))
    version = {"gptq": 1, "gptq_v2": 2}.get(config.get("checkpoint_format", "gptq"))
    if bits not in _BITS.values() or not isinstance(group, int) or version is None:
        raise CheckpointError(f"{file}: {METHOD} of {bits} bits in groups of {group}, format "
                              f"{config.get('checkpoint_format')!r} is not supported")  # fmt: skip
    names = [n.removesuffix(".qweight") for n in checkpoint.names() if n.endswith(".qweight")]
    found = {}
    for name in names:
        keys = [f"{name}.{part}" for part in _PARTS]
        if not symmetric and bits == 8:
            raise CheckpointError(f"{file}: asymmetric 8-bit {METHOD} is not supported")
        keys = tuple(key for key in keys if not key.endswith(".g_idx") or key in checkpoint)
        found[name] = Stored(keys, partial(decode, name, bits=bits, group_size=group,
                                           version=version))  # fmt: skip
    return found


def decode(name: str, tensors: Mapping[str, torch.Tensor], *, bits: int, group_size: int,
           version: int = 1) -> QuantizedTensor:  # fmt: skip
    """The weight of the linear layer `name`, from the tensors that `encode` describes.

    Args:
        name: the module's full name.
        tensors: `<name>.qweight`, `.qzeros`, `.scales` and, where it is there, `.g_idx`.
        bits: 4 or 8.
        group_size: inputs that share a scale; -1: all.
        version: 1 stores zero - 1, 2 the zero.

    Raises:
        CheckpointError: shapes that do not agree, inputs in another order than that of their
            groups, zero points that int4 or int8 cannot hold.
    """
    codes, zeros, scales = (tensors[f"{name}.{part}"] for part in _PARTS[:3])
    per_word = 32 // bits
    if codes.dim() != 2:
        raise CheckpointError(f"{name}.qweight: must be 2-d, got {list(codes.shape)}")
    k, n = codes.shape[0] * per_word, codes.shape[1]
    group = k if group_size == -1 else group_size
    groups = -(-k // group)
    for part, tensor, dtypes, shape in (
        ("qweight", codes, (torch.int32,), (k // per_word, n)),
        ("qzeros", zeros, (torch.int32,), (groups, -(-n // per_word))),
        ("scales", scales, FLOATS, (groups, n)),
    ):
        expect(f"{name}.{part}", tensor, dtypes, shape)
    order = tensors.get(f"{name}.g_idx")
    if order is not None and not torch.equal(order.long(), torch.arange(k) // group):
        raise CheckpointError(f"{name}.g_idx: inputs out of the order of their groups "
                              f"(desc_act) are not supported")  # fmt: skip
    row, zero = row_bytes(transposed(codes)), row_bytes(zeros)
    zero = transposed(unpack(zero, n) if bits == 4 else zero[:, :n]).int() + (version == 1)
    default, form = (8, "int4") if bits == 4 else (128, "int8")
    scale, zero_point = transposed(scales), None
    if bool((zero != default).any()):
        if bits == 8 or bool((zero > 15).any()):
            raise CheckpointError(f"{name}.qzeros: zero points that {form} cannot hold: "
                                  f"{int(zero.min())} to {int(zero.max())}")  # fmt: skip
        zero_point = zero.to(torch.uint8)
    if bits == 8:
        if groups > 1:
            raise CheckpointError(f"{name}: 8-bit {METHOD} in groups of {group} is not supported")
        row, scale = (row ^ 128).view(torch.int8), scale.float()
    size = -1 if group_size == -1 or bits == 8 else group_size
    qt = QuantizedTensor(form, torch.Size((n, k)), scales.dtype, row, scale, zero_point,
                         group_size=size)  # fmt: skip
    qt.check(f"{name}: ")
    return qt


def quantization_config(*, bits: int, group_size: int, skip: Iterable[str] = (),
                        version: int = 1) -> dict:  # fmt: skip
    """The `quantization_config` of config.json, and the content of quantize_config.json.

    Args:
        bits: 4 or 8, the same for all layers.
        group_size: inputs that share a scale, the same for all layers; -1: all.
        skip: linear layers inside the blocks that are not quantized (lm_head never is).
        version: as `encode`; under 2 groups may be asymmetric.
    """
    dynamic = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in sorted(skip)}
    return {
        "quant_method": METHOD,
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": version == 1,
        "lm_head": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
        "static_groups": False,
        "meta": {"quantizer": ["genai_perf"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }
