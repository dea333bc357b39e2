"""quant_matmul: y = x @ W.T from quantized bytes, and the gradient of x (inputs: see `linear`)."""

import torch

from ..._errors import BackendUnsupported
from ...ops.quant_matmul import cases as listed
from ...ops.quant_matmul import quant_matmul
from ...ops.quant_matmul.api import QUANT_MATMUL
from ..problem import Problem, Variant, asked
from . import linear
from .linear import check, named

__all__ = ["check", "named"]

PHASES = linear.PHASES
BASELINE = "torch-dense"
BACKENDS = QUANT_MATMUL.backends
# Rows of x rounded to a type: what it is, and the formats of W that it meets.
ROUNDED = {"int8-x": ("int8", ("int8", "int4")), "fp8-x": ("fp8", ("fp8",))}
EXTRA = tuple(f"{backend}:{name}" for backend in ("triton", "native") for name in ROUNDED)
HEADLINE = ("nf4-1x4096x4096-float32", "nf4-1x4096x4096-bfloat16", "int4-1x4096x4096-float32",
            "int4-128x4096x4096-float32", "int8-1x4096x4096-float32",
            "fp8-1x4096x4096-float32")  # fmt: skip


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    return linear.make("quant_matmul", listed, case, phase, device, seed,
                       lambda weight: weight.dequantize(torch.float32),
                       {"format": case.format, **case.options})  # fmt: skip


def own(problem: Problem, backend: str) -> Variant:
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    backend, _, rounding = backend.partition(":")
    if not rounding:
        name = asked(backend, quant_matmul, x, weight)
        return linear.variant(problem, lambda x: quant_matmul(x, weight, backend=name), x)
    kind, formats = ROUNDED[rounding]
    if weight.format not in formats or problem.phase != "forward":
        raise BackendUnsupported(
            f"{rounding}: {kind} activations are for the forward of {' and '.join(formats)} weights"
        )
    name = asked(backend, quant_matmul, x, weight, activations=kind)
    return linear.variant(
        problem, lambda x: quant_matmul(x, weight, activations=kind, backend=name), x,
        numerics=kind,
    )  # fmt: skip
