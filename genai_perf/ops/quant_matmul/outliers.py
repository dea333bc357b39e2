"""LLM.int8: columns of x with large values are multiplied as they are, the others in int8."""

from collections.abc import Callable

import torch

from ..._checks import fail


def check(activations: str | None, threshold: float, format: str) -> None:
    if threshold < 0 or (threshold and (activations, format) != ("int8", "int8")):
        fail("quant_matmul", "threshold", "0, or more with activations='int8' and int8 weights",
             f"{threshold} with activations={activations!r} and {format}")  # fmt: skip


def multiply(x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
             threshold: float, product: Callable) -> torch.Tensor:  # fmt: skip
    """`product` in int8, but for the columns of x that hold a magnitude of `threshold` or more in
    any row: those meet the dequantized columns of W in fp32. All is rounded once.

    Args:
        x: (..., K); W: qdata int8 (N, K), scale fp32 (N, 1); bias: (N) or None.
        product: of (x, qdata, scale, bias): int8 rows of x times W, plus bias, in the dtype of x.
    """
    columns = (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0).nonzero()[:, 0]
    if not columns.numel():
        return product(x, qdata, scale, bias)
    rest = product(x.float().index_fill(-1, columns, 0.0), qdata, scale, bias)
    dense = qdata[:, columns].float() * scale
    return (rest + x[..., columns].float() @ dense.T).to(x.dtype)
