"""compressed-tensors: unpacking int4 weights and dequantizing, as a model without kernels does."""

import torch
import torch.nn.functional as F

from ..problem import Problem, Unsupported, Variant
from ..suites import linear

MODULE = "compressed_tensors"
DEVICES = ("cpu", "cuda")
VARIANTS = {"compressed-tensors": ("quant_matmul",)}


def build(variant: str, problem: Problem) -> Variant:
    from compressed_tensors.compressors import unpack_from_int32

    weight, x = problem.inputs["weight"], problem.inputs["x"]
    if weight.format != "int4" or weight.zero_point is not None or weight.group_size <= 0:
        raise Unsupported(f"measured for symmetric int4 in groups, the case is {weight.format}")
    n, k = weight.shape
    if k % weight.group_size or k % 8:
        raise Unsupported("compressed-tensors wants rows of whole groups")
    words, scale = weight.qdata.view(torch.int32), weight.scale.float().unsqueeze(-1)

    def layer(x: torch.Tensor) -> torch.Tensor:
        codes = unpack_from_int32(words, 4, torch.Size((n, k)))
        dense = codes.view(n, -1, weight.group_size).float() * scale
        return F.linear(x, dense.view(n, k).to(x.dtype))

    numerics = None if x.dtype == torch.float32 else str(x.dtype)[6:]
    return linear.variant(problem, layer, x, numerics=numerics)
