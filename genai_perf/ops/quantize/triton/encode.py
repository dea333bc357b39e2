"""Quantizing on GPUs: which kernel, its output, grid and configuration."""

from functools import cache

import torch

from ...._backends import triton as toolchain
from ....formats import FORMATS, CodeBook, Spec
from ....formats.base import ceil_div, check_finite
from ....formats.code_book import nest
from . import FP8_SHAPES, runs
from .encode_kernels import _quantize_book_kernel, _quantize_rows_kernel

# Not measured.
ROWS_CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
BOOK_ELEMENTS = 1024  # of one program
BOOK_CONFIG = {"num_warps": 4, "num_stages": 1}


def quantize(x: torch.Tensor, format: str, spec: Spec) -> list[torch.Tensor]:
    check_finite(x)
    chosen, x = FORMATS[format], x.contiguous()
    if x.numel() == 0:
        return list(chosen.encode(x.float(), spec).values())
    layout = chosen.layout(x.shape, spec._replace(double_quant=False))
    out = {name: x.new_empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    if isinstance(chosen, CodeBook):
        _book(x, chosen, spec.group_size, out)
        if spec.double_quant:
            out |= nest(out["scale"])
    else:
        encode_rows(x, format, *runs(x.shape, spec.group_size), out["qdata"], out["scale"])
    return list(out.values())


def encode_rows(x: torch.Tensor, format: str, k: int, width: int, codes: torch.Tensor,
                scale: torch.Tensor, *, mark: bool = False) -> None:  # fmt: skip
    """Codes and scales of runs of `width` elements of rows of k; x is contiguous, not empty.

    mark: a run with an infinity or NaN gets codes of 0 and a scale of NaN; without, there is none.
    """
    mantissa, lowest = FP8_SHAPES.get(format, (0, 0))
    top = 127.0 if format == "int8" else FORMATS[format].max
    toolchain.launch(
        _quantize_rows_kernel, x.numel() // k * ceil_div(k, width), x.device, x,
        codes if format == "int8" else codes.view(torch.uint8), scale, k, width, top,
        MANTISSA=mantissa, LOWEST=lowest, MARK=mark, enable_fp_fusion=False, **ROWS_CONFIG,
    )  # fmt: skip


@cache
def _tables(book: CodeBook, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return book.bounds(device), torch.tensor(book.order, dtype=torch.uint8, device=device)


def _book(x: torch.Tensor, book: CodeBook, width: int, out: dict) -> None:
    count, rows = x.numel() // width, max(1, BOOK_ELEMENTS // width)
    toolchain.launch(
        _quantize_book_kernel, ceil_div(count, rows), x.device, x, out["qdata"], out["scale"],
        *_tables(book, x.device), count, width, ROWS=rows, PAIRS=width // 2,
        enable_fp_fusion=False, **BOOK_CONFIG,
    )  # fmt: skip
