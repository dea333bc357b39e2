"""torch.optim.AdamW, its moments in the dtype of the parameter: loops, or its fused kernel."""

import torch

from ..problem import Problem, Unsupported, Variant
from ..suites.optimizer_step import EPS, LR, STEP, moments, named

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {"torch-adamw": ("optimizer_step",), "torch-adamw:fused": ("optimizer_step",)}


def build(variant: str, problem: Problem) -> Variant:
    if problem.options["kind"] != "adamw":
        raise Unsupported("torch.optim has no Lion")
    p = torch.nn.Parameter(problem.inputs["p"].clone())
    p.grad = problem.inputs["grad"].clone()
    optimizer = torch.optim.AdamW([p], lr=LR, eps=EPS, weight_decay=0.0,
                                  fused=variant.endswith("fused"))  # fmt: skip
    held = (x.view_as(p).to(p.dtype) for x in moments(problem))
    device = p.device if variant.endswith("fused") else "cpu"
    state = dict(zip(("exp_avg", "exp_avg_sq"), held, strict=True))
    optimizer.state[p] = {"step": torch.tensor(STEP - 1.0, device=device), **state}

    def call() -> dict:
        optimizer.step()
        return {"p": p}

    return Variant(call, named, None if p.dtype == torch.float32 else str(p.dtype)[6:])
