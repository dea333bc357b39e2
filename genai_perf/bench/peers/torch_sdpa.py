"""torch's scaled_dot_product_attention: as torch chooses, and each of its backends by name."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..problem import Problem, Unsupported, Variant
from ..suites.attention import named

MODULE = None
DEVICES = ("cpu", "cuda")
_BACKENDS = {
    "torch-sdpa": None,
    "torch-sdpa:math": SDPBackend.MATH,
    "torch-sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "torch-sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
}
VARIANTS = {name: ("attention",) for name in _BACKENDS}


def heads_first(problem: Problem) -> list[torch.Tensor]:
    """q, k, v and, for the backward, dout as (batch, heads, seqlen, dim), contiguous leaves."""
    found = []
    for x in problem.inputs.values():
        moved = x.detach().transpose(1, 2).contiguous()
        found.append(moved.requires_grad_(x.requires_grad))
    return found


def attention_variant(problem: Problem, function, tensors: list[torch.Tensor],
                      result=lambda x: x.transpose(1, 2)) -> Variant:  # fmt: skip
    """A variant from a function of (q, k, v), on tensors in the layout that it wants."""
    q, k, v, *rest = tensors

    def forward():
        with torch.no_grad():
            return (function(q, k, v),)

    def both():
        out = function(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), rest[0])

    call = forward if problem.phase == "forward" else both
    return Variant(call, lambda raw: named(tuple(result(x) for x in raw)))


def build(variant: str, problem: Problem) -> Variant:
    q, k = problem.inputs["q"], problem.inputs["k"]
    if problem.options["causal"] and q.shape[1] != k.shape[1]:
        raise Unsupported("torch aligns is_causal to the top left, genai_perf to the bottom right")
    backend = _BACKENDS[variant]
    if backend is not None and problem.device == "cpu" and backend not in (
            SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):  # fmt: skip
        raise Unsupported(f"torch has no {backend.name.lower()} on the CPU")
    options = {"is_causal": problem.options["causal"], "enable_gqa": problem.options["group"] > 1}

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    def chosen(q, k, v):
        with sdpa_kernel(backend):
            return plain(q, k, v)

    return attention_variant(problem, plain if backend is None else chosen, heads_first(problem))
