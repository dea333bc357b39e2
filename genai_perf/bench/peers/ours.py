"""Our own kernels without what the case adds: what it must beat to be worth having.

"ours:plain-cache" is decode attention over the same cache in the dtype of q, "ours:dense-int4" the
quantized layer that holds every weight in int4.
"""

import torch

from ...ops.quant_matmul import quant_matmul
from ...ops.quantize import quantize
from ..problem import Problem, Unsupported, Variant
from ..suites import decode_attention, linear

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {"ours:plain-cache": ("decode_attention",), "ours:dense-int4": ("sparse_matmul",)}


def build(variant: str, problem: Problem) -> Variant:
    if problem.op == "decode_attention":
        return _plain_cache(problem)
    weight = quantize(problem.inputs["dense"], "int4")
    return linear.variant(problem, lambda x: quant_matmul(x, weight), problem.inputs["x"],
                          weight=weight.dequantize(torch.float32))  # fmt: skip


def _plain_cache(problem: Problem) -> Variant:
    given = dict(problem.inputs)
    if given["k_scale"] is None:
        raise Unsupported("the cache of the case is in the dtype of q")
    for cache, scale in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
        given[cache] = (given[cache].float() * given[scale][..., None, :, None]).to(problem.dtype)
        given[scale] = None
    return decode_attention.variant(given, None)
