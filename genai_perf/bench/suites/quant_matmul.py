"""quant_matmul: y = x @ W.T from the packed weight, and the gradient of x through it.

Inputs x (m, k), dy (m, n), weight (a QuantizedTensor) and dense, what it dequantizes to in float32.
"""

import torch
import torch.nn.functional as F

from ...ops.quant_matmul import cases as listed
from ...ops.quant_matmul import quant_matmul
from ...ops.quant_matmul.api import QUANT_MATMUL
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Variant

PHASES = ("forward", "backward")
BASELINE = "torch-dense"
BACKENDS = QUANT_MATMUL.backends
HEADLINE = ("nf4-1x4096x4096-float32", "nf4-1x4096x4096-bfloat16", "int4-1x4096x4096-float32",
            "int4-128x4096x4096-float32", "int8-1x4096x4096-float32",
            "fp8-1x4096x4096-float32")  # fmt: skip


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    x, weight, _ = listed.make_inputs(case, device, seed)
    inputs = {"x": x, "weight": weight, "dense": weight.dequantize(torch.float32)}
    if phase == "backward":
        generator = torch.Generator().manual_seed(seed + 2)
        inputs["dy"] = torch.randn(case.m, case.n, generator=generator).to(x).requires_grad_(False)
    flops, moved = listed.cost(case)
    return Problem("quant_matmul", case.name, phase, device, case.dtype, inputs, flops, moved,
                   {"format": case.format, **case.options})  # fmt: skip


def own(problem: Problem, backend: str) -> Variant:
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    if problem.phase == "forward":
        return Variant(lambda: quant_matmul(x, weight, backend=backend), named)
    dy, leaf = problem.inputs["dy"], x.detach().requires_grad_()
    # Built once: the gradient needs no numbers of the forward but the weight's.
    with torch.enable_grad():
        y = quant_matmul(leaf, weight, backend=backend)
    return Variant(lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0], named)


def named(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": raw}


def _rounded(x: torch.Tensor, numerics: str) -> torch.Tensor:
    """x as a variant sees it that rounds its activations to a smaller type."""
    if not numerics.startswith("int"):
        return x.to(getattr(torch, numerics))
    largest = {"int8": 127, "int7": 63}[numerics]
    scale = x.double().abs().amax(-1, keepdim=True) / largest
    return ((x.double() / scale).round() * scale).to(torch.float32)


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    """The oracle multiplies the dequantized weight in float64; the yardstick is torch's dense
    product in the dtype of x, or with x rounded as the variant rounds it."""
    dense = (problem.inputs["dense"] if weight is None else weight).detach()
    forward = problem.phase == "forward"
    left = problem.inputs["x" if forward else "dy"].detach()
    right = dense if forward else dense.T
    exact = left.double() @ right.double().T
    seen = left if numerics is None else _rounded(left, numerics)
    same = F.linear(seen, right.to(seen.dtype))
    kept = outputs["out"].dtype
    allowed = (2 if forward else 3) * max_error(same, exact) + rounding(exact, kept)
    return Check(max_error(outputs["out"], exact), allowed)
