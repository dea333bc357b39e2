"""The cases that tests and benchmarks of quant_matmul share."""

import math
from dataclasses import dataclass, field

import torch

from ... import formats
from ...formats import QuantizedTensor
from .. import linear


@dataclass(frozen=True)
class Case:
    """One call: x (m, k) of `dtype` against a weight (n, k) in `format` with `options`.

    Tags: "smoke" a quick look at every kernel, "edge" odd shapes and layouts, "grad" gradients,
    "bench" large enough to time, "model" shapes of real models.
    """

    name: str
    m: int
    n: int
    k: int
    format: str
    options: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    bias: bool = False
    tags: tuple[str, ...] = ()


# Every layout that a kernel reads its own way.
WEIGHTS = {
    "nf4": ("nf4", {}),
    "nf4-double": ("nf4", {"double_quant": True}),
    "nf4-g32": ("nf4", {"group_size": 32}),
    "nf4-g256": ("nf4", {"group_size": 256, "double_quant": True}),
    "fp4": ("fp4", {}),
    "fp4-double": ("fp4", {"double_quant": True}),
    "int4": ("int4", {}),
    "int4-asymmetric": ("int4", {"symmetric": False}),
    "int4-g32-asymmetric-bf16": (
        "int4",
        {"group_size": 32, "symmetric": False, "scale_dtype": torch.bfloat16},
    ),
    "int4-g8": ("int4", {"group_size": 8}),
    "int4-g24-asymmetric": ("int4", {"group_size": 24, "symmetric": False}),
    "int4-row-fp16": ("int4", {"group_size": -1, "scale_dtype": torch.float16}),
    "int3": ("int3", {}),
    "int3-g32-asymmetric": ("int3", {"group_size": 32, "symmetric": False}),
    "int2": ("int2", {"group_size": -1, "scale_dtype": torch.bfloat16}),
    "int2-g64-asymmetric": ("int2", {"group_size": 64, "symmetric": False}),
    "fp8-group": ("fp8", {"granularity": "group"}),
    "fp8_e3m4": ("fp8_e3m4", {}),
    "fp8_e3m4-group": ("fp8_e3m4", {"granularity": "group"}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "fp8-tensor": ("fp8", {"granularity": "tensor"}),
    "fp8-block": ("fp8", {"granularity": "block"}),
    "fp8_240": ("fp8_240", {}),
    "fp8_240-block": ("fp8_240", {"granularity": "block"}),
    "fp8_e5m2": ("fp8_e5m2", {}),
    "fp8_e5m2-block": ("fp8_e5m2", {"granularity": "block"}),
}
# Rows on both sides of the limits between kernels, and of register tiles.
ROWS = (0, 1, 2, 3, 5, 8, 17, 64, 130)
# (n, k): one element, odd, blocks across row ends, a whole number of everything.
SHAPES = ((1, 1), (3, 33), (43, 172), (512, 64), (3, 4096), (130, 300))
BENCH_SHAPES = ((4096, 4096), (14336, 4096))


def _cases() -> list[Case]:
    cases = []
    for name, (fmt, options) in WEIGHTS.items():
        for m in (1, 17):
            cases.append(Case(f"{name}-smoke-{m}", m, 43, 172, fmt, options, bias=True,
                              tags=("smoke", "grad")))  # fmt: skip
        for n, k in SHAPES:
            for m in ROWS:
                cases.append(Case(f"{name}-{m}x{n}x{k}", m, n, k, fmt, options, bias=n % 2 == 1,
                                  tags=("edge",)))  # fmt: skip
    for name in ("nf4", "nf4-double", "int4", "int8", "fp8", "fp8_e5m2"):
        fmt, options = WEIGHTS[name]
        for n, k in BENCH_SHAPES:
            for m in (1, 4, 128, 512):
                for dtype in (torch.float32, torch.bfloat16):
                    label = str(dtype).removeprefix("torch.")
                    cases.append(Case(f"{name}-{m}x{n}x{k}-{label}", m, n, k, fmt, options, dtype,
                                      tags=("bench", "model")))  # fmt: skip
    return cases


CASES = _cases()


def make_weight(case: Case, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(case.n, case.k, generator=generator) / max(1, case.k) ** 0.5
    return formats.get(case.format).quantize(dense, **case.options)


def make_inputs(
    case: Case, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, QuantizedTensor, torch.Tensor | None]:
    """x (m, k), the quantized weight and bias (n) or None, as `quant_matmul` takes them."""
    return linear.make_inputs(case, make_weight(case, seed), device, seed)


def weight_bytes(case: Case) -> int:
    """Bytes of all components of the weight."""
    codec = formats.get(case.format)
    layout = codec.layout((case.n, case.k), codec.spec(**case.options))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes): multiplications and additions, and what must be read and written once."""
    activations = case.m * (case.k + case.n) + case.n * case.bias
    moved = weight_bytes(case) + case.dtype.itemsize * activations
    return 2 * case.m * case.n * case.k, moved
