"""What ops that multiply by a packed weight share: the shape of a product, inputs of cases."""

import torch


def fake_product(x: torch.Tensor, *others, backend: str | None = None) -> torch.Tensor:
    """What a product of x looks like: the last argument says how wide it is."""
    return x.new_empty((*x.shape[:-1], others[-1]))


def make_inputs(case, weight, device: torch.device | str, seed: int):
    """x (m, k), the weight and bias (n) or None of a case, on `device`.

    Args:
        case: with m, n, k, dtype and bias.
        weight: anything with `to(device)`.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(case.m, case.k, generator=generator).to(case.dtype)
    bias = torch.randn(case.n, generator=generator).to(case.dtype) if case.bias else None
    return x.to(device), weight.to(device), None if bias is None else bias.to(device)
