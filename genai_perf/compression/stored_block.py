"""A quantized layer as its checkpoint stores it, and a stored block back in the model."""

from collections.abc import Mapping

import torch

from ..formats import QuantizedTensor
from ..io import bitsandbytes, compressed_tensors
from .steps import GPTQ, RTN


def encode(
    name: str, qweight: QuantizedTensor, int8: str, quantizer: RTN | GPTQ
) -> tuple[dict[str, torch.Tensor], compressed_tensors.Scheme | None]:
    """The stored tensors of a quantized layer and their scheme, None under nf4."""
    if qweight.format == "nf4":
        return bitsandbytes.encode(name, qweight), None
    activations = getattr(quantizer, "activations", None) is not None
    int8 = "int-quantized" if activations else int8
    scheme = compressed_tensors.scheme(qweight, int8=int8)
    tensors = compressed_tensors.encode(name, qweight, int8=int8)
    return tensors, scheme._replace(activations=activations)


def decode(
    name: str, tensors: Mapping[str, torch.Tensor], scheme: compressed_tensors.Scheme | None
) -> QuantizedTensor:
    """What `encode` was given."""
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
        schemes: full name -> scheme of each quantized layer, among others.
    """
    model.load_block(i)
    for name in model.block_tensors(i).keys() & tensors.keys():
        model.set_tensor(name, tensors[name])  # folds change normalizations too
    for name, linear in model.linears(i).items():
        if name in schemes:
            weight = decode(name, tensors, schemes[name])
            weight = weight.dequantize(model.stored_dtype(model.tensor_name(name, linear)))
            model.set_weight(linear, weight)
