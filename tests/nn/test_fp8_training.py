"""Fp8Linear against an emulation in float64 on ml_dtypes' codes, its histories, and training."""

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import genai_perf as gp
from genai_perf.nn import Fp8Linear, train_in_fp8

E4M3, E5M2 = (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)


def rounded(x, kind, largest=None):
    """float64 of x rounded to fp8 by a scale of `largest`, its own magnitude by default."""
    code, top = kind
    x = x.detach().float().numpy()
    scale = np.float32((np.abs(x).max() if largest is None else largest) / np.float32(top))
    values = np.clip(x / scale, -top, top).astype(code).astype(np.float64) * np.float64(scale)
    return torch.from_numpy(values)


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = Fp8Linear(48, 24, dtype=dtype, **options)
    x = (torch.randn(2, 7, 48) * 3).to(dtype).requires_grad_()
    dy = (torch.randn(2, 7, 24) * 1e-3).to(dtype)
    return layer, x, dy


def flat(t):
    return t.reshape(-1, t.shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_products_are_those_of_the_codes(scaling, dtype):
    layer, x, dy = make(dtype, scaling=scaling)
    y = layer(x)
    y.backward(dy)
    x8, w8, g8 = rounded(flat(x), E4M3), rounded(layer.weight, E4M3), rounded(flat(dy), E5M2)
    tolerance = {torch.float32: 1e-5}.get(dtype, 2e-2)

    def close(got, want):
        assert got.dtype == dtype
        size = want.abs().max().item()
        torch.testing.assert_close(flat(got).double(), want, rtol=tolerance, atol=tolerance * size)

    close(y - layer.bias, x8 @ w8.T)
    close(x.grad, g8 @ w8)
    close(layer.weight.grad, g8.T @ x8)
    close(layer.bias.grad[None], flat(dy).double().sum(0)[None])


def test_codes_are_those_of_the_format():
    layer, x, _ = make()
    qt = gp.quantize(flat(x), "fp8", granularity="tensor")
    kept = layer(x).grad_fn
    while not hasattr(kept, "saved_tensors") or len(kept.saved_tensors) != 4:
        kept = kept.next_functions[0][0]
    x8, scale, *_ = kept.saved_tensors
    assert torch.equal(x8.view(torch.uint8), qt.qdata.view(torch.uint8))
    assert torch.equal(scale, qt.scale.reshape(()))


def test_scaled_mm_of_torch_agrees():
    layer, x, _ = make(dtype=torch.bfloat16)
    a, b = (gp.quantize(t.detach(), "fp8", granularity="tensor") for t in (flat(x), layer.weight))
    want = torch._scaled_mm(a.qdata, b.qdata.T, scale_a=a.scale.reshape(()),
                            scale_b=b.scale.reshape(()), out_dtype=torch.float32)  # fmt: skip
    got = flat(layer(x) - layer.bias).float()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_straight_through_is_near_the_dense_gradient():
    layer, x, dy = make()
    dense = nn.Linear(48, 24)
    dense.load_state_dict(layer.state_dict())
    layer(x).backward(dy)
    got = [x.grad.clone(), layer.weight.grad]
    x.grad = None
    dense(x).backward(dy)
    for ours, theirs in zip(got, (x.grad, dense.weight.grad), strict=True):
        assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()


def test_a_delayed_scale_is_that_of_the_past():
    layer, x, dy = make(scaling="delayed", history=2)
    sizes = (1.0, 4.0, 0.5, 0.5)
    seen = []
    for size in sizes:
        one = x.detach() * size
        past = [amax for amax in seen[-2:]]
        y = layer(one) - layer.bias
        y.backward(dy * size)
        largest = max(past) if past else None
        want = rounded(flat(one), E4M3, largest) @ rounded(layer.weight, E4M3).T
        torch.testing.assert_close(flat(y).double(), want, rtol=1e-4, atol=1e-4)
        seen.append(one.abs().max().item())
        assert layer.amax_history[0, -1].item() == pytest.approx(seen[-1])
        assert layer.amax_history[2, -1].item() == pytest.approx((dy * size).abs().max().item())
    before = layer.amax_history.clone()
    layer.eval()(x * 100)
    assert torch.equal(layer.amax_history, before)
    twin = Fp8Linear(48, 24, scaling="delayed", history=2)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.amax_history, before)
    assert layer.to(torch.bfloat16).amax_history.dtype == torch.float32
    assert torch.equal(copy.deepcopy(layer).amax_history, before)


def test_zeros_infinities_and_no_rows():
    layer, x, dy = make()
    zero = torch.zeros(3, 48)
    assert torch.equal(layer(zero), layer.bias.expand(3, 24))
    assert layer(torch.empty(0, 48)).shape == (0, 24)
    odd = x.detach().clone()
    odd[0, 0, 0], odd[1, 0, 0] = torch.inf, torch.nan
    y = layer(odd)
    assert torch.isfinite(y[0]).all() and y[1, 0].isnan().all() and torch.isfinite(y[1, 1:]).all()


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_it_trains_as_the_dense_model_does(scaling):
    def losses(model):
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(16, 32, generator=generator) / 32**0.5
        for _ in range(150):
            x = torch.randn(64, 32, generator=generator)
            loss = (model(x) - (x @ teacher.T).tanh()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 16))
    ours = train_in_fp8(copy.deepcopy(dense), scaling=scaling)
    weight = ours[0].weight
    assert isinstance(ours[2], Fp8Linear) and isinstance(weight, nn.Parameter)
    want, got = losses(dense), losses(ours)
    assert got[-1] < 0.2 * got[0]
    assert sum(got[-20:]) < 1.25 * sum(want[-20:])


def test_bad_input():
    with pytest.raises(ValueError, match="scaling must be one of"):
        Fp8Linear(4, 4, scaling="later")
    with pytest.raises(ValueError, match="history must be at least 1"):
        Fp8Linear(4, 4, scaling="delayed", history=0)
    with pytest.raises(ValueError, match="linear must be an nn.Linear, got LayerNorm"):
        Fp8Linear.from_float(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"x must be \(..., 4\)"):
        Fp8Linear(4, 4)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="model must be one that holds nn.Linear layers"):
        train_in_fp8(nn.Sequential(nn.LayerNorm(4)))
