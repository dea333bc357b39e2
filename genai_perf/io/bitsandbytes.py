"""The bitsandbytes dialect: nf4 and fp4 weights, optionally with double quantization, and int8.

For a linear layer P of shape (N, K), nf4 (fp4 with its own name and code book):
    P.weight                                uint8 (ceil(N*K/2), 1), two codes a byte
    P.weight.absmax                         fp32 (blocks,); uint8 codes when double-quantized
    P.weight.quant_map                      fp32 (16,), the code book
    P.weight.nested_absmax                  fp32 (ceil(blocks/256),), double-quantized only
    P.weight.nested_quant_map               fp32 (256,), the dynamic map, double-quantized only
    P.weight.quant_state.bitsandbytes__nf4  uint8, JSON: dtype, shape, block sizes, nested offset
int8:
    P.weight                                int8 (N, K)
    P.SCB                                   fp32 (N,), the absmax of each row
    P.weight_format                         uint8 (), 0: rows as they are

Source: bitsandbytes 0.50, `functional.QuantState`, `nn.Linear8bitLt`.
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from .._checks import check_choice
from .._errors import CheckpointError
from ..formats import QuantizedTensor, get
from ..formats.base import FLOATS
from ..formats.code_book import NESTED_BLOCK
from ..formats.dynamic_map import dynamic_map
from .checkpoints import Checkpoint
from .stored import Stored

METHOD = "bitsandbytes"
BOOKS = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
STATE = f"{_STATE}nf4"
_PARTS = ("weight", "weight.absmax", "weight.quant_map")
_NESTED_PARTS = ("weight.nested_absmax", "weight.nested_quant_map")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def encode(name: str, qt: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that stand for the weight of the linear layer `name`.

    Args:
        name: the module's full name.
        qt: its weight in nf4, fp4 or int8, (N, K), also where the layer is a Conv1D, which
            bitsandbytes loads as a linear one.

    Raises:
        CheckpointError: another format.
    """
    if qt.format == "int8":
        return {
            f"{name}.weight": qt.qdata,
            f"{name}.SCB": _row_absmax(qt.scale.reshape(-1)),
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    if qt.format not in BOOKS:
        raise CheckpointError(f"{name}: {METHOD} holds nf4, fp4 and int8, got {qt.format}")
    state = {
        "quant_type": qt.format,
        "blocksize": qt.group_size,
        "dtype": str(qt.dtype).removeprefix("torch."),
        "shape": list(qt.shape),
    }
    tensors = {
        "weight": qt.qdata.reshape(-1, 1),
        "weight.absmax": qt.scale,
        "weight.quant_map": get(qt.format).book(),
    }
    if qt.nested_scale is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                  "nested_offset": float(qt.scale_offset)}  # fmt: skip
        tensors |= {"weight.nested_absmax": qt.nested_scale,
                    "weight.nested_quant_map": dynamic_map()}  # fmt: skip
    tensors[_STATE + qt.format] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def _row_absmax(scale: torch.Tensor) -> torch.Tensor:
    """The fp32 number whose 127th part is `scale`: the product, or one of its neighbours."""
    product = scale * 127
    found = product
    for direction in (torch.inf, 0.0):
        other = torch.nextafter(product, torch.full_like(product, direction))
        found = torch.where((found / 127 != scale) & (other / 127 == scale), other, found)
    return found


def find(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The quantized linear layers of a checkpoint in this dialect.

    Raises:
        CheckpointError: another kind of 8-bit layout than rows.
    """
    config, names = checkpoint.quantization, checkpoint.names()
    found = {}
    for key in names:
        name, _, form = key.partition(f".{_STATE}")
        if config.get("load_in_4bit") and form in BOOKS:
            keys = (f"{name}.{part}" for part in (*_PARTS, _STATE + form, *_NESTED_PARTS))
            keys = tuple(key for key in keys if key in checkpoint)
            found[name] = Stored(keys, partial(decode, name, format=form))
        elif config.get("load_in_8bit") and key.endswith(".SCB"):
            name = key.removesuffix(".SCB")
            keys = tuple(f"{name}.{part}" for part in ("weight", "SCB", "weight_format"))
            keys = tuple(key for key in keys if key in checkpoint)
            found[name] = Stored(keys, partial(decode_int8, name))
    return found


def decode_int8(name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """The int8 weight of the linear layer `name`.

    Raises:
        CheckpointError: a tensor is missing or does not fit; another layout than rows.
    """
    for part in ("weight", "SCB"):
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"tensor '{name}.{part}' is missing")
    layout = tensors.get(f"{name}.weight_format")
    if layout is not None and int(layout) != 0:
        raise CheckpointError(f"{name}.weight_format: must be 0 (rows), got {int(layout)}")
    weight, absmax = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
    qt = QuantizedTensor("int8", weight.shape, torch.float32, weight,
                         (absmax.float() / 127).reshape(-1, 1))  # fmt: skip
    qt.check(f"{name}.weight: ")
    return qt


def decode(name: str, tensors: Mapping[str, torch.Tensor],
           format: str = "nf4") -> QuantizedTensor:  # fmt: skip
    """The nf4 or fp4 weight of the linear layer `name`.

    Raises:
        CheckpointError: a tensor is missing or is not what its state says; another code book.
    """
    place = f"{name}.{_STATE}{format}"
    try:
        state = json.loads(bytes(tensors[place].tolist()))
        dtype, shape = _DTYPES[state["dtype"]], torch.Size(state["shape"])
        block, nested = int(state["blocksize"]), "nested_blocksize" in state
        offset = (
            torch.tensor(float(state["nested_offset"]), dtype=torch.float32) if nested else None
        )
        if nested and int(state["nested_blocksize"]) != NESTED_BLOCK:
            raise ValueError(f"nested_blocksize {state['nested_blocksize']}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: does not describe an {format} weight: {error!r}") from None
    if missing := [part for part in (*_PARTS, *_NESTED_PARTS * nested)
                   if f"{name}.{part}" not in tensors]:  # fmt: skip
        raise CheckpointError(f"tensor '{name}.{missing[0]}' is missing")
    found = {part: tensors[f"{name}.{part}"] for part in (*_PARTS, *_NESTED_PARTS * nested)}
    books = {"weight.quant_map": get(format).book()}
    if nested:
        books["weight.nested_quant_map"] = dynamic_map()
    for part, book in books.items():
        if found[part].shape != book.shape or not torch.equal(found[part].float(), book):
            raise CheckpointError(f"{name}.{part}: is not the code book of {format}")
    qdata = found["weight"]
    if qdata.dtype != torch.uint8:  # packed into a wider dtype for FSDP: the same bytes
        qdata = qdata.contiguous().view(torch.uint8)
    scale = found["weight.absmax"] if nested else found["weight.absmax"].float()
    qt = QuantizedTensor(format, shape, dtype, qdata.reshape(-1), scale, group_size=block,
                         nested_scale=found.get("weight.nested_absmax"),
                         scale_offset=offset)  # fmt: skip
    qt.check(f"{name}.weight: ")
    return qt


def quantization_config(*, dtype: torch.dtype, skip: Iterable[str], format: str = "nf4",
                        double_quant: bool = False) -> dict:  # fmt: skip
    """The `quantization_config` of config.json.

    Args:
        dtype: of the computation, that of the model.
        skip: names of the linear layers that are not quantized, lm_head among them.
        format: "nf4", "fp4" or "int8", of all quantized layers.
        double_quant: nf4 or fp4 with quantized scales.
    """
    check_choice(METHOD, "format", format, (*BOOKS, "int8"))
    return {
        "quant_method": METHOD,
        "load_in_4bit": format in BOOKS,
        "load_in_8bit": format == "int8",
        "bnb_4bit_quant_type": "fp4" if format == "fp4" else "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(skip),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
