"""The kernel as it ships, for the ahead-of-time gate."""

from collections.abc import Iterator

from ...._backends.triton_aot import Source
from ...quant_matmul.triton.shipped import WEIGHTS, weight_arguments
from .kernel import _dequantize_kernel
from .launch import CONFIG


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships for `arch`; the subset holds one source."""
    options = {name: CONFIG[name] for name in ("num_warps", "num_stages")}
    for weight in ("nf4 double",) if subset else WEIGHTS:
        constants, pointers = weight_arguments(_dequantize_kernel, weight, CONFIG)
        yield Source(f"dequantize bf16 {weight}", _dequantize_kernel, constants, "bf16", pointers,
                     (), options | {"enable_fp_fusion": False}, "none")  # fmt: skip
