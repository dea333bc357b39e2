"""The cases that tests and benchmarks of sparse_matmul share."""

from dataclasses import dataclass

import torch

from ... import formats
from ...formats import SparseTensor, sparse, sparse24
from .. import linear


@dataclass(frozen=True)
class Case:
    """One call: x (m, k) of `dtype` against a weight (n, k) in `layout` with `values`.

    Tags: "smoke" a quick look at every kernel, "edge" odd shapes, "bench" large enough to time,
    "model" shapes of real models.
    """

    name: str
    m: int
    n: int
    k: int
    layout: str
    values: str
    dtype: torch.dtype = torch.float32
    bias: bool = False
    tags: tuple[str, ...] = ()


LAYOUTS = ("2:4", "bitmask")
VALUES = ("float32", "bfloat16", "float16", "int8", "int4", "int4-g8", "int4-row")
# Rows on both sides of the limits between kernels.
ROWS = (0, 1, 2, 3, 5, 8, 9, 40)
SHAPES = ((1, 1), (3, 33), (43, 172), (5, 4104), (130, 300), (24, 384))
BENCH_SHAPES = ((4096, 4096), (14336, 4096))


def _cases() -> list[Case]:
    cases = []
    for layout in LAYOUTS:
        for values in VALUES:
            label = f"{layout.replace(':', '')}-{values}"
            for m in (1, 17):
                cases.append(Case(f"{label}-smoke-{m}", m, 43, 172, layout, values, bias=True,
                                  tags=("smoke", "grad")))  # fmt: skip
            for n, k in SHAPES:
                for m in ROWS:
                    cases.append(Case(f"{label}-{m}x{n}x{k}", m, n, k, layout, values,
                                      bias=n % 2 == 1, tags=("edge",)))  # fmt: skip
            for n, k in BENCH_SHAPES:
                cases.append(Case(f"{label}-1x{n}x{k}", 1, n, k, layout, values,
                                  tags=("bench", "model")))  # fmt: skip
    return cases


CASES = _cases()


def make_dense(case: Case, seed: int = 0) -> torch.Tensor:
    """(n, k) fp32 with half of it zero, as the layout wants it."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(case.n, case.k, generator=generator) / max(1, case.k) ** 0.5
    if case.layout == "bitmask":
        return dense * (torch.rand(dense.shape, generator=generator) < 0.5)
    padded = torch.nn.functional.pad(dense, (0, -case.k % 4)).unflatten(1, (-1, 4))
    rank = torch.rand(padded.shape, generator=generator).argsort(2)
    return (padded * (rank < 2)).flatten(1)[:, : case.k].contiguous()


def make_weight(case: Case, seed: int = 0) -> SparseTensor:
    dense = make_dense(case, seed)
    pack = sparse24.pack if case.layout == "2:4" else sparse.pack
    if not case.values.startswith("int"):
        return pack(dense.to(getattr(torch, case.values)))
    name, _, group = case.values.partition("-")
    options = {"g8": {"group_size": 8, "scale_dtype": torch.bfloat16}, "row": {"group_size": -1}}
    return pack(formats.get(name).quantize(dense, **options.get(group, {})))


def make_inputs(
    case: Case, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, SparseTensor, torch.Tensor | None]:
    """x (m, k), the packed weight and bias (n) or None, as `sparse_matmul` takes them."""
    return linear.make_inputs(case, make_weight(case, seed), device, seed)


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes): multiplications and additions of kept weights, and what must be read and
    written once."""
    weight = make_weight(case)
    activations = case.m * (case.k + case.n) + case.n * case.bias
    return case.m * case.n * case.k, weight.nbytes + case.dtype.itemsize * activations
