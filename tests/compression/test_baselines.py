"""Hessian accumulation and the baselines: magnitude, Wanda, RTN."""

import numpy as np
import pytest
import torch
from layers import layer

from genai_perf import CalibrationError, formats
from genai_perf.compression import magnitude, owl, ria, rtn, wanda
from genai_perf.compression.hessian import Hessian, damp, factorize, relative_error


def test_hessian_is_the_mean_second_moment():
    x = torch.randn(3, 50, 12)
    hessian = Hessian(12)
    for part in x.bfloat16().split(1):
        hessian.add(part)
    rows = x.bfloat16().double().reshape(-1, 12)
    assert hessian.tokens == 150
    torch.testing.assert_close(
        hessian.matrix().double(), 2 * rows.T @ rows / 150, rtol=1e-5, atol=1e-5
    )


def test_padding_stays_out():
    x, keep = torch.randn(2, 6, 4), torch.tensor([[1] * 6, [1] * 2 + [0] * 4], dtype=torch.bool)
    padded, short = Hessian(4), Hessian(4)
    x[~keep] = torch.nan
    padded.add(x, keep)
    short.add(x[0])
    short.add(x[1, :2])
    assert padded.tokens == 8
    torch.testing.assert_close(padded.matrix(), short.matrix())


def test_hessian_errors():
    hessian = Hessian(4, name="blocks.0.fc")
    with pytest.raises(CalibrationError, match="blocks.0.fc: no calibration token"):
        hessian.matrix()
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 4\)"):
        hessian.add(torch.ones(2, 5))
    hessian.add(torch.full((2, 4), torch.inf))
    with pytest.raises(CalibrationError, match="blocks.0.fc.*NaN or infinity"):
        hessian.matrix()


def test_accumulation_ignores_a_lowered_matmul_precision():
    x = torch.randn(256, 64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        hessian = Hessian(64)
        hessian.add(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(hessian.matrix().double(), 2 * x.double().T @ x.double() / 256,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_factor_squares_to_the_hessian():
    hessian = layer(columns=700, tokens=1500)[1].double()
    hessian = (hessian + hessian.T) / 2  # its rounding in fp32 is not symmetric
    damped, dead = damp(hessian, 0.01)
    factor = factorize(hessian, damp_frac=0.01)
    assert torch.equal(factor.root, factor.root.tril()) and (factor.root.diagonal() > 0).all()
    assert factor.order is None and not dead.any()
    torch.testing.assert_close(factor.root.T @ factor.root, damped)
    sorted_ = factorize(hessian, damp_frac=0.01, by_diagonal=True)
    assert (damped.diagonal()[sorted_.order].diff() <= 0).all()
    damped = damped[sorted_.order][:, sorted_.order]
    torch.testing.assert_close(sorted_.root.T @ sorted_.root, damped)


def test_what_fp32_cannot_factor_is_factored_in_float64():
    """Two channels that one token drives to 1000 times the rest, as large models have."""
    hessian = layer(columns=128, tokens=4000)[1]
    spike = torch.zeros(128)
    spike[5], spike[90] = 300, 290
    hessian += torch.outer(spike, spike) * hessian.diagonal().mean()
    hessian = (hessian + hessian.T) / 2
    damped = damp(hessian.double(), 1e-4)[0]
    exact = 1 / torch.linalg.cholesky(torch.linalg.inv(damped)).diagonal()
    single = torch.linalg.cholesky(damped.float().flip(0, 1)).diagonal().flip(0)

    def worst(diagonal):
        return (diagonal / exact - 1).abs().max()

    root = factorize(hessian, damp_frac=1e-4).root
    assert root.dtype == torch.float32
    assert worst(root.diagonal()) < 1e-4 < worst(single)


def test_relative_error_of_outputs():
    weight, x = torch.randn(8, 16), torch.randn(16, 500)
    hessian = Hessian(16)
    hessian.add(x.T)
    want = (0.1 * weight[:4] @ x).square().sum() / (weight @ x).square().sum()
    after = torch.cat([weight[:4] * 0.9, weight[4:]])
    assert relative_error(weight, after, hessian.matrix()) == pytest.approx(float(want), rel=1e-4)
    assert relative_error(weight * 0, weight * 0, hessian.matrix()) == 0


@pytest.mark.parametrize("columns", [1, 512, 513, 1300])
def test_relative_error_over_any_number_of_panels(columns):
    weight, hessian = layer(rows=5, columns=max(4, columns))
    weight, hessian = weight[:, :columns], hessian[:columns, :columns]
    after = weight + 0.1 * torch.randn(weight.shape)
    want = (weight - after).double(), weight.double()
    lost, total = (((d @ hessian.double()) * d).sum() for d in want)
    assert relative_error(weight, after, hessian) == pytest.approx(float(lost / total), rel=1e-4)


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.99])
def test_magnitude_prunes_the_smallest_of_the_layer(sparsity):
    weight, hessian = layer(rows=9, columns=75)
    result = magnitude.solve(weight, hessian, sparsity=sparsity)
    count = round(weight.numel() * sparsity)
    pruned = np.argsort(weight.abs().numpy().reshape(-1), kind="stable")[:count]
    want = weight.clone().reshape(-1)
    want[pruned] = 0
    assert torch.equal(result.weight.reshape(-1), want)
    assert (~result.mask).sum() == count


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.99])
def test_wanda_prunes_the_least_weight_times_norm_of_each_row(sparsity):
    weight, hessian = layer(rows=9, columns=75)
    result = wanda.solve(weight, hessian, sparsity=sparsity)
    scores = weight.abs().numpy() * np.sqrt(hessian.diagonal().numpy())
    for row, kept in zip(scores, result.mask.numpy(), strict=True):
        assert set(np.flatnonzero(~kept)) == set(
            np.argsort(row, kind="stable")[: round(75 * sparsity)]
        )
    assert torch.equal(result.weight, weight * result.mask)


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.99])
def test_ria_prunes_the_least_share_of_row_and_column(sparsity):
    weight, hessian = layer(rows=9, columns=75)
    size = weight.abs().double().numpy()
    shares = size / size.sum(0, keepdims=True) + size / size.sum(1, keepdims=True)
    scores = (shares * hessian.diagonal().double().numpy() ** 0.25).reshape(-1)
    mask = ria.solve(weight, hessian, sparsity=sparsity).mask
    pruned = np.argsort(scores, kind="stable")[: round(675 * sparsity)]
    assert set(np.flatnonzero(~mask.numpy())) == set(pruned)
    weight[:, 3] = weight[2] = 0  # an empty row and column divide 0 by 0
    again = ria.solve(weight, hessian, sparsity=0.5)
    assert torch.isfinite(again.weight).all() and not again.mask[2].any()


def test_owl_keeps_the_mean_and_follows_the_outliers():
    ratios, sizes = [0.01, 0.06, 0.02, 0.03], [10, 30, 20, 40]
    amounts = owl.allocate(ratios, sizes, 0.7)
    assert sum(a * n for a, n in zip(amounts, sizes, strict=True)) == pytest.approx(70)
    assert np.argsort(amounts).tolist() == [1, 3, 2, 0]
    assert max(amounts) - min(amounts) == pytest.approx(0.16)
    assert owl.allocate([0.5, 0.5], [1, 2], 0.6) == [0.6, 0.6]
    for sparsity in (0.0, 0.01, 0.99):
        amounts = owl.allocate(ratios, sizes, sparsity)
        assert all(0 <= a < 1 for a in amounts)
        assert sum(a * n for a, n in zip(amounts, sizes, strict=True)) == pytest.approx(
            100 * sparsity
        )
    weight, energy = torch.ones(2, 50), torch.ones(50)
    energy[7] = 10000.0  # |w| norm of 100 where the mean is just below 3
    assert owl.outlier_ratio([(weight, energy)]) == pytest.approx(2 / 100)
    with pytest.raises(ValueError, match="layers must be at least one"):
        owl.outlier_ratio([])
    with pytest.raises(ValueError, match="sparsity must be at least 0 and below 1"):
        owl.allocate(ratios, sizes, 1.0)


@pytest.mark.parametrize("solve", [magnitude.solve, wanda.solve, ria.solve])
@pytest.mark.parametrize("columns", [64, 70])
def test_patterns(solve, columns):
    weight, hessian = layer(rows=5, columns=columns)
    mask = solve(weight, hessian, pattern="2:4").mask
    for part in mask.split(4, dim=1):
        assert ((~part).sum(1) == part.shape[1] // 2).all()


@pytest.mark.parametrize("solve", [magnitude.solve, wanda.solve, ria.solve])
def test_zeros_stay_and_count(solve):
    weight, hessian = layer(rows=4, columns=32)
    once = solve(weight, hessian, sparsity=0.25)
    twice = solve(once.weight, hessian, sparsity=0.5)
    assert not (twice.mask & ~once.mask).any() and (~twice.mask).sum() == 64


@pytest.mark.parametrize("name", formats.FORMATS)
def test_rtn_is_the_format_and_keeps_zeros(name):
    weight, hessian = layer(columns=172)
    weight[:, ::2] = 0
    result = rtn.solve(weight, hessian, format=name)
    assert torch.equal(result.weight, formats.get(name).quantize(weight).dequantize())
    assert not result.weight[:, ::2].any()
    assert 0 < result.error < {"int3": 0.1, "int2": 0.3}.get(name, 0.05)


@pytest.mark.parametrize("options", [
    {"format": "int8"}, {"format": "fp8"}, {"format": "fp8", "granularity": "block"},
    {"format": "fp8", "granularity": "tensor"}, {"format": "int4", "group_size": 64},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_have_values_of_the_wanted_dtype(options, dtype):
    weight, hessian = layer(columns=192)
    weight[3] *= 1e-4
    weight[4] = 0
    result = rtn.solve(weight, hessian, scale_dtype=dtype, **options)
    result.qweight.check()
    scale = result.qweight.scale.float()
    assert torch.equal(scale.to(dtype).float(), scale)
    assert result.error < 1.1 * rtn.solve(weight, hessian, **options).error
    assert not result.weight[4].any() and torch.isfinite(result.weight).all()


@pytest.mark.parametrize("solver", [wanda, ria, magnitude])
def test_a_hessian_with_nan_is_named(solver):
    weight, hessian = layer()
    hessian[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="mlp.up: its Hessian holds NaN or infinity"):
        solver.solve(weight, hessian, sparsity=0.5, name="mlp.up")
