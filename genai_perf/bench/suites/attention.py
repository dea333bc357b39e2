"""attention: forward, and forward with backward.

Inputs q, k, v, dout (batch, seqlen, heads, headdim). The oracle judges the last group of heads of
the last batch entry, all of whose numbers depend on nothing else: the whole matrix of scores in
float64 would not fit for the long cases.
"""

import math

import torch

from ...ops.attention import attention
from ...ops.attention import cases as listed
from ...ops.attention.op import BACKENDS as _BACKENDS
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Variant, asked, join

PHASES = ("forward", "forward+backward")
BASELINE = "torch-sdpa"
BACKENDS = _BACKENDS
HEADLINE = ("float32_s512_d64_causal", "float32_s1024_d128_causal", "bfloat16_s512_d64_causal",
            "bfloat16_s1024_d128_full")  # fmt: skip
_NAMES = ("q", "k", "v")


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    inputs = listed.make_inputs(case, device, seed)
    dim_v = inputs["v"].shape[3]
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    dout = torch.randn(case.batch, case.seqlen_q, case.nheads, dim_v, generator=generator,
                       device=device).to(case.dtype)  # fmt: skip
    flops, moved = listed.cost(case)
    if phase == "forward":
        tensors = {name: inputs[name] for name in _NAMES}
    else:
        tensors = {name: inputs[name].requires_grad_() for name in _NAMES} | {"dout": dout}
        flops, moved = int(3.5 * flops), 2 * moved
    return Problem("attention", case.name, phase, device, case.dtype, tensors, flops, moved,
                   {"causal": case.causal, "group": case.nheads // case.nheads_k})  # fmt: skip


def own(problem: Problem, backend: str) -> Variant:
    q, k, v = (problem.inputs[name] for name in _NAMES)
    causal = problem.options["causal"]
    name = asked(backend, attention, q, k, v, causal=causal)

    def forward():
        with torch.no_grad():
            return (attention(q, k, v, causal=causal, backend=name),)

    def both():
        out = attention(q, k, v, causal=causal, backend=name)
        return out, *torch.autograd.grad(out, (q, k, v), problem.inputs["dout"])

    return Variant(forward if problem.phase == "forward" else both, named)


def named(raw: tuple) -> dict[str, torch.Tensor]:
    return dict(zip(("out", "dq", "dk", "dv"), (x.detach() for x in raw), strict=False))


def _last_group(problem: Problem, name: str, x: torch.Tensor) -> torch.Tensor:
    """The last batch entry's last group of query heads, or its one key head."""
    heads = 1 if name in ("k", "v", "dk", "dv") else problem.options["group"]
    return x.detach()[-1:, :, -heads:]


def _eager(q, k, v, dout, causal: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Attention by plain products, in one dtype throughout; torch's math path would widen bf16."""
    leaves = [x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    scores = leaves[0] / math.sqrt(q.shape[-1]) @ leaves[1].transpose(2, 3)
    if causal:
        rows, columns = scores.shape[2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(
            columns - rows + 1
        )
        scores = scores.masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1) @ leaves[2]
    found = (out,)
    if dout is not None:
        found += torch.autograd.grad(out, leaves, dout.to(dtype).transpose(1, 2))
    return named(tuple(x.detach().transpose(1, 2) for x in found))


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    parts = {name: _last_group(problem, name, x) for name, x in problem.inputs.items()}
    q, k, v, dout = (parts.get(name) for name in ("q", "k", "v", "dout"))
    causal = problem.options["causal"]

    def both() -> tuple[dict, dict]:
        exact = _eager(q, k, v, dout, causal, torch.float64)
        same = _eager(q, k, v, dout, causal, problem.dtype)
        return exact, {name: max_error(same[name], exact[name]) for name in exact}

    exact, same = problem.once("exact", both)
    found = []
    for name in exact if problem.phase != "forward" else ("out",):
        part, factor = _last_group(problem, name, outputs[name]), 2 if name == "out" else 3
        allowed = factor * same[name]
        found.append(Check(max_error(part, exact[name]),
                           allowed + rounding(exact[name], problem.dtype)))  # fmt: skip
    return join(found)
