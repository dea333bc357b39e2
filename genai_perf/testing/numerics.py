"""The numerics rule for kernels, after FlashAttention's tests: no tolerance picked by hand."""

import torch


def max_error(x: torch.Tensor, ref64: torch.Tensor) -> float:
    """max|x - ref64|, infinities of one sign counting as equal; NaN if either has one elsewhere."""
    x, ref = x.detach().double().cpu(), ref64.detach().double().cpu()
    if x.shape != ref.shape:
        raise ValueError(f"max_error: x must be of shape {tuple(ref.shape)}, got {tuple(x.shape)}")
    difference = torch.where(x == ref, 0.0, (x - ref).abs())
    return difference.max().item() if difference.numel() else 0.0


def rounding(ref64: torch.Tensor, dtype: torch.dtype) -> float:
    """2 max|(ref + 0.3 - 0.3) - ref| in `dtype`: what rounding the reference itself gives."""
    ref = ref64.detach()[torch.isfinite(ref64)].to(dtype)
    return 2 * max_error(ref + 0.3 - 0.3, ref)


def assert_close_to_oracle(
    out: torch.Tensor,
    ref64: torch.Tensor,
    ref_same_precision: torch.Tensor,
    factor: float = 2,
    name: str = "out",
) -> None:
    """Assert max|out - ref64| <= factor * max|ref_same_precision - ref64| + rounding(ref64).

    Args:
        out: what the kernel gave; its dtype decides the rounding term.
        ref64: the oracle, float64.
        ref_same_precision: the eager reference run in the kernel's own dtype.
        factor: 2 for outputs, 3 for gradients.
        name: of the tensor, for the message.

    Raises:
        AssertionError: the error is larger, or something is not finite where the oracle is.
    """
    error, yardstick = max_error(out, ref64), max_error(ref_same_precision, ref64)
    bound = factor * yardstick + rounding(ref64, out.dtype)
    if not error <= bound:
        raise AssertionError(
            f"{name}: max error {error:.3e} is above {bound:.3e} = {factor} * {yardstick:.3e} "
            f"(reference in {ref_same_precision.dtype}) + rounding"
        )
