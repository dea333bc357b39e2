"""quantize and dequantize. Inputs x, the tensor, and packed, what it quantizes to.

Every backend gives the same bits, so the oracle is the reference codec: what comes back from the
codes must be as near to x as the reference's is.
"""

import torch

from ..._errors import BackendUnsupported
from ...formats import get
from ...ops.quantize import cases as listed
from ...ops.quantize import dequantize, quantize
from ...ops.quantize.api import _DEQUANTIZE, _QUANTIZE
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Variant

PHASES = ("quantize", "dequantize")
BASELINE = "torch-reference"
BACKENDS = tuple(dict.fromkeys((*_DEQUANTIZE.backends, *_QUANTIZE.backends)))
HEADLINE = ("nf4-4096-float32", "nf4-4096-bfloat16", "int8-4096-float32", "int4-4096-float32")


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    x = listed.make_inputs(case, device, seed)
    packed = get(case.format).quantize(x, **case.options)
    flops, moved = listed.cost(case)
    return Problem("quantize", case.name, phase, device, case.dtype, {"x": x, "packed": packed},
                   flops, moved, {"format": case.format, **case.options})  # fmt: skip


def own(problem: Problem, backend: str) -> Variant:
    x, packed, options = problem.inputs["x"], problem.inputs["packed"], dict(problem.options)
    fmt = options.pop("format")
    known = (_QUANTIZE if problem.phase == "quantize" else _DEQUANTIZE).backends
    if backend is not None and backend not in known:
        raise BackendUnsupported(f"{problem.phase} has no backend {backend}")
    if problem.phase == "quantize":
        return Variant(lambda: quantize(x, fmt, **options, backend=backend), codes)
    return Variant(lambda: dequantize(packed, problem.dtype, backend=backend), named)


def codes(raw) -> dict[str, torch.Tensor]:
    return {"out": raw.dequantize(torch.float32)}


def named(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": raw}


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    reference = problem.inputs["packed"].dequantize(torch.float32)
    if problem.phase == "quantize":
        x = problem.inputs["x"].double()
        allowed = max_error(reference, x)
        return Check(max_error(outputs["out"], x), allowed * (1 + 1e-6))
    exact = reference.double()
    # Two roundings: a peer may multiply by the scale and by 1/127 in turn.
    return Check(
        max_error(outputs["out"], exact),
        max_error(reference.to(problem.dtype), exact) + 2 * rounding(exact, problem.dtype),
    )
