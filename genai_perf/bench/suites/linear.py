"""What the suites of linear layers share: y = x @ W.T from a packed weight, and the gradient of x.

Inputs x (m, k), dy (m, n), weight (packed) and dense (n, k), what it stands for, in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...ops.quant_matmul.rounding import fp8_values
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Unsupported, Variant

PHASES = ("forward", "backward")


def make(op: str, listed, case, phase: str, device: str, seed: int, dense: Callable,
         options: dict) -> Problem:  # fmt: skip
    """The problem of a case of `listed`, an op's module of cases; `dense` unpacks the weight."""
    x, weight, _ = listed.make_inputs(case, device, seed)
    inputs = {"x": x, "weight": weight, "dense": dense(weight)}
    if phase == "backward":
        generator = torch.Generator().manual_seed(seed + 2)
        inputs["dy"] = torch.randn(case.m, case.n, generator=generator).to(x).requires_grad_(False)
    flops, moved = listed.cost(case)
    return Problem(op, case.name, phase, device, case.dtype, inputs, flops, moved, options)


def variant(problem: Problem, layer: Callable, x: torch.Tensor, **about) -> Variant:
    """A variant from a linear layer as a function of x, in the phase of the problem.

    Raises:
        Unsupported: the layer has no gradient for its input.
    """
    if problem.phase == "forward":
        return Variant(lambda: layer(x), named, **about)
    leaf = x.detach().requires_grad_()
    # Built once: the gradient needs no numbers of the forward but the weight's.
    with torch.enable_grad():
        y = layer(leaf)
    if not y.requires_grad:
        raise Unsupported("it has no gradient for its input")
    dy = problem.inputs["dy"].to(y.dtype)
    return Variant(lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0], named, **about)


def named(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": raw}


def _rounded(x: torch.Tensor, numerics: str) -> torch.Tensor:
    """x as a variant sees it that rounds its activations to a smaller type."""
    if numerics == "fp8":
        return fp8_values(x, "fp8", -1)
    if not numerics.startswith("int"):
        return x.to(getattr(torch, numerics))
    largest = {"int8": 127, "int7": 63}[numerics]
    scale = x.double().abs().amax(-1, keepdim=True) / largest
    return ((x.double() / scale).round() * scale).to(torch.float32)


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    """The oracle multiplies the dense weight in float64; the yardstick is torch's dense product in
    the dtype of x, or with x rounded as the variant rounds it."""
    dense = (problem.inputs["dense"] if weight is None else weight).detach()
    forward = problem.phase == "forward"
    left = problem.inputs["x" if forward else "dy"].detach()
    right = dense if forward else dense.T

    def product() -> torch.Tensor:
        return left.double() @ right.double().T

    exact = problem.once("exact", product) if weight is None else product()
    seen = left if numerics is None else _rounded(left, numerics)
    same = F.linear(seen, right.to(seen.dtype))
    kept = outputs["out"].dtype
    allowed = (2 if forward else 3) * max_error(same, exact) + rounding(exact, kept)
    return Check(max_error(outputs["out"], exact), allowed)
