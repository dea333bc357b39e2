"""A quantized layer as its checkpoint stores it, and a stored block back in the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..formats import QuantizedTensor
from ..io import bitsandbytes, compressed_tensors
from .steps import GPTQ, RTN

Schemes = dict[str, compressed_tensors.Scheme | None]


def encode(
    names: Sequence[str], qweight: QuantizedTensor, int8: str, quantizer: RTN | GPTQ
) -> tuple[dict[str, torch.Tensor], Schemes]:
    """The stored tensors of a quantized layer, and the scheme of each of `names`, None under nf4.

    Args:
        names: what the checkpoint calls the layer; several share its rows equally, in order.
    """
    tensors: dict[str, torch.Tensor] = {}
    schemes: Schemes = {}
    for name, part in zip(names, _parts(qweight, len(names)), strict=True):
        if part.format == "nf4":
            tensors |= bitsandbytes.encode(name, part)
            schemes[name] = None
            continue
        activations = getattr(quantizer, "activations", None) is not None
        layout = "int-quantized" if activations else int8
        scheme = compressed_tensors.scheme(part, int8=layout)
        schemes[name] = scheme._replace(activations=activations)
        tensors |= compressed_tensors.encode(name, part, int8=layout)
    return tensors, schemes


def _parts(qweight: QuantizedTensor, count: int) -> Iterator[QuantizedTensor]:
    """Equal numbers of rows, each with its scales."""
    rows = qweight.shape[0] // count
    for start in range(0, rows * count, rows):
        part = qweight if count == 1 else qweight.rows(start, start + rows)
        if count > 1:  # what is written must not share memory
            part = replace(part, **{k: t.clone() for k, t in part.components().items()})
        yield part


def decode(
    name: str, tensors: Mapping[str, torch.Tensor], scheme: compressed_tensors.Scheme | None
) -> QuantizedTensor:
    """What `encode` was given, or its part of this name."""
    if scheme is None:
        return bitsandbytes.decode(name, tensors)
    return compressed_tensors.decode(name, tensors, scheme)


def put_block(
    model,
    i: int,
    tensors: Mapping[str, torch.Tensor],
    schemes: Mapping[str, compressed_tensors.Scheme | None],
) -> None:
    """Loads block i and gives it the compressed weights that `tensors` hold.

    Args:
        model: a `BlockModel`.
        tensors: what was written of the block, by name.
        schemes: name in the checkpoint -> scheme of each quantized layer, among others.
    """
    model.load_block(i)
    for name in model.block_tensors(i).keys() & tensors.keys():
        model.set_tensor(name, tensors[name])  # folds change normalizations too
    for name, linear in model.linears(i).items():
        names = model.stored_names(name, linear)
        if names and names[0] in schemes:
            dtype = model.stored_dtype(model.tensor_name(name, linear))
            parts = [decode(n, tensors, schemes[n]).dequantize(dtype) for n in names]
            model.set_weight(linear, torch.cat(parts))
