"""Synthetic layers whose inputs are correlated and have a few large channels, as real ones do."""

import torch

from genai_perf.compression.hessian import Hessian


def layer(rows=48, columns=320, tokens=1024, seed=0):
    """(weight (rows, columns) fp32, Hessian (columns, columns) fp32)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weight = normal(rows, columns) / columns**0.5
    x = normal(tokens, columns // 4) @ normal(columns // 4, columns) / 8
    x += 0.5 * normal(tokens, columns)
    x[:, 3::101] *= 15
    hessian = Hessian(columns)
    hessian.add(x)
    return weight, hessian.matrix()
