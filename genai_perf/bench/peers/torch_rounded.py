"""torch's products of rounded rows of x: int8 by `torch._int_mm`, fp8 by `torch._scaled_mm`."""

import torch

from ..problem import Problem, Unsupported, Variant
from ..suites import linear

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {"torch-int-mm": ("quant_matmul",), "torch-scaled-mm": ("quant_matmul",)}


def build(variant: str, problem: Problem) -> Variant:
    wanted = "int8" if variant == "torch-int-mm" else "fp8"
    if problem.phase != "forward" or problem.options["format"] != wanted:
        raise Unsupported(f"it is the forward of {wanted} weights by row")
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    if problem.device == "cuda" and x.shape[0] <= 16:
        raise Unsupported(f"on a GPU it takes more than 16 rows, got {x.shape[0]}")
    codes, scale = weight.qdata.T, weight.scale.T.contiguous()

    def int8(x):
        units = x.abs().amax(-1, keepdim=True).float() / 127
        rounded = (x / units).round().to(torch.int8)
        return (torch._int_mm(rounded, codes).float() * scale * units).to(x.dtype)

    def fp8(x):
        units = x.abs().amax(-1, keepdim=True).float() / 448
        rounded = (x / units).to(torch.float8_e4m3fn)
        # Scales by row give bfloat16 and nothing else.
        return torch._scaled_mm(rounded, codes, scale_a=units, scale_b=scale,
                                out_dtype=torch.bfloat16)  # fmt: skip

    return linear.variant(problem, int8 if wanted == "int8" else fp8, x, numerics=wanted)
