"""A quantized layer as its checkpoint stores it, and a stored block back in the model."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..formats import QuantizedTensor, rows
from ..io import bitsandbytes, compressed_tensors
from .capture import Layer
from .experts import Expert
from .steps import GPTQ, RTN

Schemes = dict[str, compressed_tensors.Scheme | None]


def encode(
    names: Sequence[str], qweight: QuantizedTensor, int8: str, quantizer: RTN | GPTQ, layer: Layer
) -> tuple[dict[str, torch.Tensor], Schemes]:
    """The stored tensors of a quantized layer, and the scheme of each of `names`, None under nf4.

    Args:
        names: what the checkpoint calls the layer; several share its rows equally.
    """
    tensors: dict[str, torch.Tensor] = {}
    schemes: Schemes = {}
    for name, part in zip(names, _parts(qweight, len(names), layer), strict=True):
        if part.format == "nf4":
            tensors |= bitsandbytes.encode(name, part)
            schemes[name] = None
            continue
        activations = getattr(quantizer, "activations", None) is not None
        # Experts in int8 are read by transformers from packed words alone.
        packed = isinstance(layer, Expert) and not activations
        layout = "pack-quantized" if packed else "int-quantized" if activations else int8
        scheme = compressed_tensors.scheme(part, int8=layout)
        schemes[name] = scheme._replace(activations=activations)
        tensors |= compressed_tensors.encode(name, part, int8=layout)
    return tensors, schemes


def _parts(qweight: QuantizedTensor, count: int, layer: Layer) -> Iterator[QuantizedTensor]:
    """Equal numbers of rows, each with its scales."""
    if count == 1:
        yield qweight
        return
    for part in rows.split(qweight, count, interleaved=layer.stack.interleaved):
        yield part.own()  # what is written must not share memory


def encode_bias(names: Sequence[str], bias: torch.Tensor, layer: Expert) -> dict[str, torch.Tensor]:
    """The biases of the layers that an expert becomes, from (out_features,) of its own."""
    count = len(names)
    parts = [bias[i::count] for i in range(count)] if layer.stack.interleaved else bias.chunk(count)
    return {f"{name}.bias": part.clone() for name, part in zip(names, parts, strict=True)}


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
    for name, tensor in model.spelling.read(model.block_tensors(i), tensors):
        model.set_tensor(name, tensor)  # folds change normalizations too
    for name, linear in model.linears(i).items():
        names = model.stored_names(name, linear)
        if names and names[0] in schemes:
            dtype = model.stored_dtype(model.tensor_name(name, linear))
            parts = [decode(n, tensors, schemes[n]).dequantize(dtype) for n in names]
            turns = isinstance(linear, Expert) and linear.stack.interleaved
            model.set_weight(linear, rows.in_turns(parts) if turns else torch.cat(parts))
