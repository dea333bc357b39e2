"""The kernels as they ship, for the ahead-of-time gate."""

from collections.abc import Iterator

from ...._backends.triton_aot import Source
from ...quant_matmul.triton.shipped import WEIGHTS, weight_arguments
from . import FP8_SHAPES
from .encode import BOOK_CONFIG, BOOK_ELEMENTS, ROWS_CONFIG
from .encode_kernels import _quantize_book_kernel, _quantize_rows_kernel
from .kernel import _dequantize_kernel
from .launch import CONFIG


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships for `arch`; the subset holds one source."""
    options = {name: CONFIG[name] for name in ("num_warps", "num_stages")}
    for weight in ("nf4 double",) if subset else WEIGHTS:
        constants, pointers = weight_arguments(_dequantize_kernel, weight, CONFIG)
        yield Source(f"dequantize bf16 {weight}", _dequantize_kernel, constants, "bf16", pointers,
                     (), options | {"enable_fp_fusion": False}, "none")  # fmt: skip
    shapes = {"int8": (0, 0), "fp8": FP8_SHAPES["fp8"], "fp8_e5m2": FP8_SHAPES["fp8_e5m2"]}
    for name, (mantissa, lowest) in list(shapes.items())[: 1 if subset else None]:
        pointers = {"q_ptr": "u8" if mantissa else "i8", "scale_ptr": "fp32"}
        for mark in (False, True):
            constants = {"BLOCK": ROWS_CONFIG["BLOCK"], "MANTISSA": mantissa, "LOWEST": lowest,
                         "MARK": mark}  # fmt: skip
            yield Source(f"quantize rows bf16 {name}" + " of activations" * mark,
                         _quantize_rows_kernel, constants, "bf16", pointers, ("top",),
                         _fixed(ROWS_CONFIG), "none")  # fmt: skip
    for width in (64,) if subset else (64, 4096):
        rows = max(1, BOOK_ELEMENTS // width)
        pointers = {"q_ptr": "u8", "order_ptr": "u8", "scale_ptr": "fp32", "bound_ptr": "fp32"}
        yield Source(f"quantize nf4 bf16 blocks of {width}", _quantize_book_kernel,
                     {"ROWS": rows, "PAIRS": width // 2}, "bf16", pointers, (),
                     _fixed(BOOK_CONFIG), "none")  # fmt: skip


def _fixed(config: dict) -> dict:
    return {name: config[name] for name in ("num_warps", "num_stages")} | {
        "enable_fp_fusion": False
    }
