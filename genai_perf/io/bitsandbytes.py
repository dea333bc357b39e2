"""The bitsandbytes dialect: nf4 weights, optionally with double quantization.

For a linear layer P of shape (N, K):
    P.weight                                uint8 (ceil(N*K/2), 1), two codes a byte
    P.weight.absmax                         fp32 (blocks,); uint8 codes when double-quantized
    P.weight.quant_map                      fp32 (16,), the code book
    P.weight.nested_absmax                  fp32 (ceil(blocks/256),), double-quantized only
    P.weight.nested_quant_map               fp32 (256,), the dynamic map, double-quantized only
    P.weight.quant_state.bitsandbytes__nf4  uint8, JSON: dtype, shape, block sizes, nested offset

Source: bitsandbytes 0.50, `functional.QuantState`.
"""

import json
from collections.abc import Iterable, Mapping

import torch

from .._errors import CheckpointError
from ..formats import QuantizedTensor
from ..formats.base import FLOATS
from ..formats.dynamic_map import dynamic_map
from ..formats.nf4 import NESTED_BLOCK, code_book

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__nf4"
_PARTS = ("weight", "weight.absmax", "weight.quant_map", STATE)
_NESTED_PARTS = ("weight.nested_absmax", "weight.nested_quant_map")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def encode(name: str, qt: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that stand for the weight of the linear layer `name`.

    Args:
        name: the module's full name.
        qt: its nf4 weight, (N, K), also where the layer is a Conv1D, which bitsandbytes loads as
            a linear one.

    Raises:
        CheckpointError: another format.
    """
    if qt.format != "nf4":
        raise CheckpointError(f"{name}: {METHOD} 4-bit holds nf4, got {qt.format}")
    state = {
        "quant_type": "nf4",
        "blocksize": qt.group_size,
        "dtype": str(qt.dtype).removeprefix("torch."),
        "shape": list(qt.shape),
    }
    tensors = {
        "weight": qt.qdata.reshape(-1, 1),
        "weight.absmax": qt.scale,
        "weight.quant_map": code_book(),
    }
    if qt.nested_scale is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                  "nested_offset": float(qt.scale_offset)}  # fmt: skip
        tensors |= {"weight.nested_absmax": qt.nested_scale,
                    "weight.nested_quant_map": dynamic_map()}  # fmt: skip
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def parts(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The tensors of the linear layer `name` among a checkpoint's; none where it is dense."""
    keys = tuple(f"{name}.{part}" for part in (*_PARTS, *_NESTED_PARTS))
    return tuple(key for key in keys if key in names) if f"{name}.{STATE}" in names else ()


def decode(name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """The weight of the linear layer `name`, from the tensors that `encode` describes.

    Raises:
        CheckpointError: a tensor is missing or is not what its state says; fp4; another code book.
    """
    place = f"{name}.{STATE}"
    try:
        state = json.loads(bytes(tensors[place].tolist()))
        dtype, shape = _DTYPES[state["dtype"]], torch.Size(state["shape"])
        block, nested = int(state["blocksize"]), "nested_blocksize" in state
        offset = torch.tensor(float(state["nested_offset"])) if nested else None
        if nested and int(state["nested_blocksize"]) != NESTED_BLOCK:
            raise ValueError(f"nested_blocksize {state['nested_blocksize']}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: does not describe an nf4 weight: {error!r}") from None
    if missing := [part for part in (*_PARTS, *_NESTED_PARTS * nested)
                   if f"{name}.{part}" not in tensors]:  # fmt: skip
        raise CheckpointError(f"tensor '{name}.{missing[0]}' is missing")
    found = {part: tensors[f"{name}.{part}"] for part in (*_PARTS, *_NESTED_PARTS * nested)}
    books = {"weight.quant_map": code_book()}
    if nested:
        books["weight.nested_quant_map"] = dynamic_map()
    for part, book in books.items():
        if found[part].shape != book.shape or not torch.equal(found[part].float(), book):
            raise CheckpointError(f"{name}.{part}: is not the code book of nf4")
    qdata = found["weight"]
    if qdata.dtype != torch.uint8:  # packed into a wider dtype for FSDP: the same bytes
        qdata = qdata.contiguous().view(torch.uint8)
    scale = found["weight.absmax"] if nested else found["weight.absmax"].float()
    qt = QuantizedTensor("nf4", shape, dtype, qdata.reshape(-1), scale, group_size=block,
                         nested_scale=found.get("weight.nested_absmax"),
                         scale_offset=offset)  # fmt: skip
    qt.check(f"{name}.weight: ")
    return qt


def quantization_config(*, double_quant: bool, dtype: torch.dtype, skip: Iterable[str]) -> dict:
    """The `quantization_config` of config.json.

    Args:
        double_quant: whether the scales are quantized too.
        dtype: of the computation, that of the model.
        skip: names of the linear layers that are not quantized, lm_head among them.
    """
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(skip),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
