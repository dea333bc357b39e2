"""decode_attention: one new query a sequence over a cache of keys and values.

Inputs: the keyword arguments of `genai_perf.decode_attention`. A case with new keys appends them,
to the same rows in every call.
"""

import math

import torch

from ...ops.decode_attention import cases as listed
from ...ops.decode_attention import decode_attention, reference
from ...ops.decode_attention.op import BACKENDS as _BACKENDS
from ...ops.decode_attention.options import New, Options, appended
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Variant, asked

PHASES = ("forward",)
BASELINE = "torch-sdpa"
BACKENDS = _BACKENDS
HEADLINE = ("fp32_4096", "bf16_4096", "int8_4096", "llama_8b_step")
# Float32 whatever the dtype of the call.
_FLOAT32 = ("alibi_slopes", "k_scale", "v_scale")


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    inputs = listed.make_inputs(case, device, seed)
    flops, moved = listed.cost(case)
    return Problem("decode_attention", case.name, phase, device, case.dtype, inputs, flops, moved,
                   {"group": case.nheads // case.nheads_k})  # fmt: skip


def own(problem: Problem, backend: str | None) -> Variant:
    return variant(problem.inputs, backend)


def variant(inputs: dict, backend: str | None) -> Variant:
    """A call with the keyword arguments `inputs`."""
    name = asked(backend, decode_attention, **inputs)
    return Variant(lambda: decode_attention(**inputs, backend=name), named)


def named(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": raw}


def _copied(inputs, dtype: torch.dtype | None = None) -> dict:
    """Clones, for a call that writes its caches; with `dtype`, those of the type of q in it."""
    kind = inputs["q"].dtype
    found = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            moves = dtype is not None and x.dtype == kind and name not in _FLOAT32
            x = x.to(dtype) if moves else x.clone()
        found[name] = x
    return found


def _same(inputs) -> torch.Tensor:
    """The reference computing in the dtype of its inputs throughout."""
    q, k_cache, v_cache = (inputs[name] for name in ("q", "k_cache", "v_cache"))
    none = dict.fromkeys(Options._fields)
    given = {name: inputs[name] for name in none if name in inputs}
    options = Options(**none | given | {
        "window_left": -1, "window_right": 0 if inputs["causal"] else -1,
        "softmax_scale": 1 / math.sqrt(q.shape[-1])})  # fmt: skip
    if inputs["k"] is not None:
        new = New(*(inputs.get(name) for name in New._fields))
        q = reference.write(q, k_cache, v_cache, new, options)
        options = appended(options, new)
    return reference.forward(q, k_cache, v_cache, *options, upcast=False)[0]


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    """The oracle is the reference in float64, the yardstick the reference in the dtype of q."""

    def both() -> tuple[torch.Tensor, float]:
        doubled = _copied(problem.inputs, torch.float64)
        exact = decode_attention(**doubled, backend="reference")
        return exact, max_error(_same(_copied(problem.inputs)), exact)

    exact, same = problem.once("exact", both)
    return Check(max_error(outputs["out"], exact), 2 * same + rounding(exact, problem.dtype))
