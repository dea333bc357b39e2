"""The formats' reference codecs in plain torch: what quantize is compared with at least."""

import torch

from ...ops.quantize import dequantize, quantize
from ..problem import Problem, Variant
from ..suites.quantize import codes, named

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {"torch-reference": ("quantize",)}


def build(variant: str, problem: Problem) -> Variant:
    options = dict(problem.options)
    fmt, x, packed = options.pop("format"), problem.inputs["x"], problem.inputs["packed"]
    if problem.phase == "quantize":
        return Variant(lambda: quantize(x, fmt, **options, backend="reference"), codes)

    def call() -> torch.Tensor:
        return dequantize(packed, problem.dtype, backend="reference")

    return Variant(call, named)
