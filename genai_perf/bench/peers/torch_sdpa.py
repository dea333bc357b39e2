"""torch's scaled_dot_product_attention: as torch chooses, and each of its backends by name."""

from contextlib import nullcontext

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
EXPANDED = "torch-sdpa:expanded"
VARIANTS = {name: ("attention", "decode_attention") for name in _BACKENDS} | {
    EXPANDED: ("decode_attention",)}  # fmt: skip


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


def _decode(variant: str, problem: Problem) -> Variant:
    """One query a sequence over a cache that torch holds as (batch, heads, keys, dim); "expanded":
    a copy of each key head for every query head, made beforehand."""
    given = problem.inputs
    q, caches, count = given["q"], (given["k_cache"], given["v_cache"]), given["cache_seqlens"]
    if given["block_table"] is not None or given["k"] is not None:
        raise Unsupported("torch's SDPA has no pages and appends nothing")
    if caches[0].dtype != q.dtype or len(set(count.tolist())) > 1:
        raise Unsupported("torch's SDPA has no quantized cache and no lengths by sequence")
    q, group = q.transpose(1, 2).contiguous(), problem.options["group"]
    k, v = (x[:, : int(count[0])].transpose(1, 2).contiguous() for x in caches)
    if variant == EXPANDED:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    options = {"enable_gqa": variant != EXPANDED and group > 1}

    def call() -> torch.Tensor:
        with _chosen(variant):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return Variant(call, lambda raw: {"out": raw.transpose(1, 2)})


def _chosen(variant: str):
    backend = _BACKENDS.get(variant)
    return nullcontext() if backend is None else sdpa_kernel(backend)


def build(variant: str, problem: Problem) -> Variant:
    backend = _BACKENDS.get(variant)
    if backend is not None and problem.device == "cpu" and backend not in (
            SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):  # fmt: skip
        raise Unsupported(f"torch has no {backend.name.lower()} on the CPU")
    if problem.op == "decode_attention":
        return _decode(variant, problem)
    q, k = problem.inputs["q"], problem.inputs["k"]
    if problem.options["causal"] and q.shape[1] != k.shape[1]:
        raise Unsupported("torch aligns is_causal to the top left, genai_perf to the bottom right")
    options = {"is_causal": problem.options["causal"], "enable_gqa": problem.options["group"] > 1}

    def function(q, k, v):
        with _chosen(variant):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attention_variant(problem, function, heads_first(problem))
