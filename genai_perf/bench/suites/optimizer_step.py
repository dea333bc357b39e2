"""optimizer_step: one step of AdamW or Lion over a parameter, in place.

Inputs p, grad and the moments, each variant its own copies. The oracle is the step in float64 from
the moments that the codes stand for; p alone is judged.
"""

import torch

from ...ops.optimizer_step import adamw_step, lion_step
from ...ops.optimizer_step import cases as listed
from ...ops.optimizer_step.api import _ADAMW
from ...ops.optimizer_step.reference import read
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Variant

PHASES = ("step",)
BASELINE = "bitsandbytes"
BACKENDS = _ADAMW.backends
HEADLINE = ("adamw-4096-float32", "lion-4096-bfloat16")
LR, EPS, STEP = 1e-3, 1e-8, 10
BETAS = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99)}


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    inputs = listed.make_inputs(case, device, seed)
    flops, moved = listed.cost(case)
    return Problem("optimizer_step", case.name, phase, device, case.dtype, inputs, flops, moved,
                   {"kind": case.kind, "block_size": case.block_size})  # fmt: skip


def own(problem: Problem, backend: str | None) -> Variant:
    given = {name: tensor.clone() for name, tensor in problem.inputs.items()}
    kind, block = problem.options["kind"], problem.options["block_size"]
    options = {"lr": LR, "weight_decay": 0.0, "block_size": block, "backend": backend}
    if kind == "adamw":
        return Variant(lambda: adamw_step(**given, step=STEP, eps=EPS, **options) or given, named)
    return Variant(lambda: lion_step(**given, **options) or given, named)


def named(raw: dict) -> dict[str, torch.Tensor]:
    return {"p": raw["p"].detach()}


def moments(problem: Problem) -> list[torch.Tensor]:
    """The moments as flat fp32."""
    given, block = problem.inputs, problem.options["block_size"]
    found = [read(given["exp_avg"], given["exp_avg_scale"], block, True)]
    if problem.options["kind"] == "adamw":
        found.append(read(given["exp_avg_sq"], given["exp_avg_sq_scale"], block, False))
    return found


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    p, g = (problem.inputs[name].double().reshape(-1) for name in ("p", "grad"))
    beta1, beta2 = BETAS[problem.options["kind"]]
    m, *second = (x.double() for x in moments(problem))
    m = beta1 * m + (1 - beta1) * g
    if second:
        v = beta2 * second[0] + (1 - beta2) * g * g
        change = LR / (1 - beta1**STEP) * m / ((v / (1 - beta2**STEP)).sqrt() + EPS)
    else:
        change = LR * m.sign()
    exact = (p - change).view_as(problem.inputs["p"])
    allowed = rounding(exact, problem.dtype) + 4e-6 * float(change.abs().max() + p.abs().max())
    return Check(max_error(outputs["p"], exact), allowed)
