"""torchao's weight-only int8 and int4 linear layers."""

import torch

from ..problem import Problem, Unsupported, Variant
from ..suites import linear

MODULE = "torchao"
DEVICES = ("cpu", "cuda")
VARIANTS = {"torchao": ("quant_matmul",)}


def build(variant: str, problem: Problem) -> Variant:
    from torchao import quantization as ao

    fmt, x, dense = problem.options["format"], problem.inputs["x"], problem.inputs["dense"]
    if fmt == "int8":
        config = ao.Int8WeightOnlyConfig()
    elif fmt == "int4" and problem.device == "cuda" and x.dtype == torch.bfloat16:
        config = ao.Int4WeightOnlyConfig(group_size=128)
    else:
        raise Unsupported(f"torchao has no weight-only {fmt} for {x.dtype} on {problem.device}")
    model = torch.nn.Sequential(torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False))
    model[0].weight.data = dense.to(x.dtype)
    ao.quantize_(model.to(problem.device), config)
    held = model[0].weight
    held = held.dequantize().float() if hasattr(held, "dequantize") else None
    numerics = None if x.dtype == torch.float32 else str(x.dtype)[6:]
    with torch.no_grad():
        return linear.variant(problem, model, x, numerics=numerics, weight=held)
