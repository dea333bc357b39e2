"""sparse_matmul: y = x @ W.T from 2:4 or bitmask weights, and the gradient of x (see `linear`)."""

import torch

from ...ops.sparse_matmul import cases as listed
from ...ops.sparse_matmul import sparse_matmul
from ...ops.sparse_matmul.api import SPARSE_MATMUL
from ..problem import Problem, Variant
from . import linear
from .linear import check, named

__all__ = ["check", "named"]

PHASES = linear.PHASES
BASELINE = "torch-dense"
BACKENDS = SPARSE_MATMUL.backends
HEADLINE = ("24-bfloat16-1x4096x4096", "24-int4-1x4096x4096", "bitmask-bfloat16-1x4096x4096")


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    return linear.make("sparse_matmul", listed, case, phase, device, seed,
                       lambda weight: weight.to_dense(torch.float32),
                       {"layout": case.layout, "values": case.values})  # fmt: skip


def own(problem: Problem, backend: str) -> Variant:
    weight = problem.inputs["weight"]
    return linear.variant(problem, lambda x: sparse_matmul(x, weight, backend=backend),
                          problem.inputs["x"])  # fmt: skip
