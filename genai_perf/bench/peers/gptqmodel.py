"""GPTQModel's Marlin kernel on our int4 codes. Not run here: it needs a GPU."""

import torch

from ..problem import Problem, Unsupported, Variant
from ..suites import linear

MODULE = "gptqmodel"
DEVICES = ("cuda",)
VARIANTS = {"gptqmodel": ("quant_matmul",)}


def build(variant: str, problem: Problem) -> Variant:
    from gptqmodel.nn_modules.qlinear.marlin import MarlinQuantLinear

    weight, x = problem.inputs["weight"], problem.inputs["x"]
    if weight.format != "int4" or weight.zero_point is not None or weight.group_size != 128:
        raise Unsupported("the Marlin kernel takes symmetric int4 in groups of 128")
    if x.dtype == torch.float32:
        raise Unsupported("the Marlin kernel takes float16 and bfloat16 only")
    n, k = weight.shape
    dense = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
    dense.weight.data = problem.inputs["dense"].half().cpu()
    layer = MarlinQuantLinear(bits=4, group_size=128, sym=True, desc_act=False, in_features=k,
                              out_features=n, bias=False, pack_dtype=torch.int32)  # fmt: skip
    groups = torch.arange(k, dtype=torch.int32) // 128
    zeros = torch.full((n, k // 128), 8.0)
    layer.pack(dense, weight.scale.cpu().half(), zeros, groups)
    layer.to(problem.device).post_init()
    return linear.variant(problem, layer, x, numerics=str(x.dtype)[6:])
