"""The Triton sweep against the torch sweep; run by test_sparsegpt_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

import pytest
import torch

from genai_perf.compression import masks, sparsegpt, sweep
from genai_perf.compression.hessian import factorize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(rows, columns):
    """(weight, Hessian) with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * columns, columns, generator=generator).cumsum(1)
    return torch.randn(rows, columns, generator=generator), x.T @ x


@pytest.mark.parametrize("setting", ["0.5", "2:4", "1:4", "4:8", "5:12", None])
@pytest.mark.parametrize("rows, columns", [(17, 53), (1, 12)])
def test_agrees_with_the_torch_sweep(setting, rows, columns, monkeypatch):
    weight, hessian = layer(rows, columns)
    root = factorize(hessian, damp_frac=0.01).root
    generator = torch.Generator().manual_seed(1)
    zero = torch.rand(weight.shape, generator=generator) < 0.15
    weight[zero] = 0
    weight[:, :4] = weight[:, :1]  # equal scores
    sparsity = None
    if setting:
        amount = (None, setting) if ":" in setting else (float(setting), None)
        sparsity = masks.parse("test", *amount)
    block_size = 24  # two whole blocks and a rest
    want, pruned, _ = sweep.sweep(weight.double(), root.double(), block_size=block_size,
                               sparsity=sparsity, zero=zero)  # fmt: skip
    monkeypatch.setattr(sweep.native, "why_not", lambda *tensors: "as on a GPU")
    monkeypatch.setattr(sweep, "_torch_step", None)
    got, chosen, _ = sweep.sweep(weight.to(DEVICE), root.to(DEVICE), block_size=block_size,
                              sparsity=sparsity, zero=zero.to(DEVICE))  # fmt: skip
    assert torch.equal(chosen.cpu(), pruned)
    torch.testing.assert_close(got.cpu(), want.float(), rtol=2e-4, atol=2e-5)


def test_the_solver_takes_it_where_native_cannot(monkeypatch):
    weight, hessian = layer(9, 60)
    want = sparsegpt.solve(weight, hessian, pattern="2:4", block_size=40)
    taken = []
    plain = sweep._triton_step
    monkeypatch.setattr(sweep.native, "why_not", lambda *tensors: "as on a GPU")
    monkeypatch.setattr(sweep, "_triton_step", lambda *args: taken.append(1) or plain(*args))
    got = sparsegpt.solve(weight.to(DEVICE), hessian.to(DEVICE), pattern="2:4", block_size=40)
    assert taken and torch.equal(got.mask.cpu(), want.mask)
    sparsegpt.solve(weight.to(DEVICE), hessian.to(DEVICE), pattern="2:4", block_size=160)
    assert len(taken) == 2  # torch, for so large a block
