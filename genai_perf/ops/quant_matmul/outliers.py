"""LLM.int8: columns of x with large values are multiplied as they are, the others in int8."""

import torch

from ..._checks import fail
from ...formats import QuantizedTensor


def check(activations: str | None, threshold: float) -> None:
    if threshold < 0 or (threshold and activations != "int8"):
        fail("quant_matmul", "threshold", "0, or more with activations='int8'",
             f"{threshold} with activations={activations!r}")  # fmt: skip


def multiply(x: torch.Tensor, qweight: QuantizedTensor, bias: torch.Tensor | None,
             threshold: float, product) -> torch.Tensor:  # fmt: skip
    """`product(x, bias)` in int8, but for the columns of x that hold a magnitude of `threshold` or
    more in any row: those meet the dequantized columns of W in fp32. All is rounded once.

    Args:
        x: (..., K); W: int8, (N, K).
        product: int8 rows of its argument times W, plus bias, in the argument's dtype.
    """
    columns = (x.detach().abs() >= threshold).reshape(-1, x.shape[-1]).any(0).nonzero()[:, 0]
    if not columns.numel():
        return product(x, bias)
    rest = product(x.float().index_fill(-1, columns, 0.0), bias)
    dense = qweight.qdata[:, columns].float() * qweight.scale
    return (rest + x[..., columns].float() @ dense.T).to(x.dtype)
