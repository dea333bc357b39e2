import numpy as np
import oracles
import pytest
import torch
from layers import layer

from genai_perf import formats
from genai_perf.compression import gptq, rtn
from genai_perf.compression.float_grid import Fp8Grid, Nf4Grid
from genai_perf.ops.quantize.grid import IntGrid

PLAIN = {"search": False}


@pytest.mark.parametrize("columns, group_size", [(320, 64), (172, 64), (256, 128), (100, 40)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", ["static", "sweep"])
def test_equals_the_paper(columns, group_size, symmetric, scales):
    weight, hessian = layer(columns=columns)
    weight, hessian = weight.double(), hessian.double()
    want = oracles.gptq(weight.numpy(), hessian.numpy(), group_size=group_size,
                        fit=oracles.minmax(symmetric), at_group=scales == "sweep")  # fmt: skip
    result = gptq.solve(weight, hessian, group_size=group_size, symmetric=symmetric, scales=scales,
                        search=False)  # fmt: skip
    # A value within rounding of the middle of two grid points may go either way, and then all after
    # it in its row differ: rows that agree must agree closely, and nearly all must.
    close = np.abs(result.weight.numpy() - want).max(1) < 1e-5
    assert close.mean() > 0.95
    ratio = result.error / oracles.error(weight, want, hessian)
    assert abs(ratio - 1) < 1e-3


def test_act_order_equals_the_paper():
    weight, hessian = layer(columns=256)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    want = oracles.gptq(weight.numpy(), hessian.numpy(), group_size=128,
                        fit=oracles.minmax(True), order=order)  # fmt: skip
    result = gptq.solve(weight, hessian, act_order=True, **PLAIN)
    ratio = result.error / oracles.error(weight, want, hessian)
    assert abs(ratio - 1) < 1e-3
    assert not torch.equal(result.weight, gptq.solve(weight, hessian, **PLAIN).weight)


@pytest.mark.parametrize("options", [
    {}, {"symmetric": False}, {"scales": "sweep"}, {"act_order": True}, {"group_size": -1},
    {"group_size": 48}, {"scale_dtype": torch.float16},
    {"scale_dtype": torch.bfloat16, "symmetric": False},
    {"bits": 8, "group_size": -1}, {"bits": 3}, {"bits": 2, "symmetric": False}, {"bits": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_codes_stand_for_the_solution(options, dtype):
    weight, hessian = layer(columns=172)
    result = gptq.solve(weight.to(dtype), hessian, **options)
    result.qweight.check()
    assert result.weight.dtype == dtype
    assert torch.equal(result.qweight.dequantize(), result.weight)
    again = formats.QuantizedTensor.from_state_dict(result.qweight.state_dict())
    assert torch.equal(again.dequantize(), result.weight)
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2  # fp16 rounds the dequantized values
    assert result.error == pytest.approx(
        oracles.error(weight.to(dtype), result.weight, hessian), rel=tolerance
    )
    plain = {k: v for k, v in options.items() if k in ("symmetric", "group_size", "scale_dtype")}
    name = f"int{options.get('bits', 4)}"
    plain = {} if name == "int8" else plain
    rounded = rtn.solve(weight.to(dtype), hessian, format=name, **plain)
    assert result.error < 0.8 * rounded.error


def test_search_finds_the_cheapest_scale():
    weight = layer(rows=6, columns=32)[0]
    importance = torch.rand(32) + 0.1
    grid = IntGrid(group_size=32)
    grid.fit(weight, importance)
    cost = sum(
        float(((grid.round(c, j) - c) ** 2).sum() * importance[j]) for j, c in enumerate(weight.T)
    )
    covering = weight.abs().amax(1, keepdim=True) / 7.5
    best = torch.full((6,), torch.inf)
    for shrink in torch.arange(33) * -0.0125 + 1:
        scale = covering * shrink
        points = (weight / scale).round().clamp(-8, 7) * scale
        best = best.minimum(((points - weight) ** 2 * importance).sum(1))
    assert cost == pytest.approx(float(best.sum()), rel=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"symmetric": False}, {"act_order": True}, {"group_size": 40},
    {"bits": 8, "group_size": -1}, {"bits": 3},
    {"scale_dtype": torch.bfloat16},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [48, 37])
def test_the_native_sweep_is_the_one_in_torch(options, rows, monkeypatch):
    weight, hessian = layer(rows=rows, columns=172)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.2
    found = gptq.solve(weight, hessian, mask=mask, **options)
    monkeypatch.setattr("genai_perf._backends.native.why_not", lambda *tensors: "not here")
    slow = gptq.solve(weight, hessian, mask=mask, **options)
    # A value within rounding of the middle of two points may go either way, with its row.
    same = (found.weight - slow.weight).abs().amax(1) < 1e-5
    assert same.float().mean() >= 0.9 and found.error == pytest.approx(slow.error, rel=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_native_search_is_the_one_in_torch(symmetric, monkeypatch):
    weight, importance = layer(rows=37, columns=100)[0], torch.rand(100) + 0.1

    def cost():
        grid = IntGrid(group_size=32, symmetric=symmetric)
        grid.fit(weight, importance)
        found = grid.pack(weight, torch.float32).dequantize()
        return ((found - weight).square() * importance).sum(1)

    native = cost()
    monkeypatch.setattr("genai_perf._backends.native.why_not", lambda *tensors: "not here")
    torch.testing.assert_close(native, cost(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [
    Fp8Grid, Nf4Grid, lambda search: Nf4Grid(search=search, double_quant=True),
    lambda search: Fp8Grid(search=search, scale_dtype=torch.bfloat16),
], ids=["fp8", "nf4", "nf4 nested", "fp8 bf16 scales"])  # fmt: skip
@pytest.mark.parametrize("search", [True, False])
def test_grids_of_other_formats(grid, search):
    weight, hessian = layer(columns=192)
    result = gptq.solve(weight, hessian, grid=grid(search=search), act_order=True)
    result.qweight.check()
    assert torch.equal(result.qweight.dequantize(), result.weight)
    assert result.error == pytest.approx(oracles.error(weight, result.weight, hessian), rel=1e-3)
    form = result.qweight.format
    assert result.error < 0.8 * rtn.solve(weight, hessian, format=form).error
    # Rounding alone, where nothing is searched for, is the format's own.
    plain = rtn.solve(weight, hessian, format=form, grid=grid(search=False))
    theirs = rtn.solve(weight, hessian, format=form)
    assert plain.error == pytest.approx(theirs.error, rel=0.05)


@pytest.mark.parametrize("form, options", [("int4", {"group_size": 32}), ("nf4", {})])
def test_searched_scales_round_better(form, options):
    weight, hessian = layer(columns=192)
    plain = rtn.solve(weight, hessian, format=form, **options).error
    grid = IntGrid(**options) if form == "int4" else Nf4Grid()
    searched = rtn.solve(weight, hessian, format=form, grid=grid)
    lost = {kind: float((result.weight - weight).square().sum())
            for kind, result in (("plain", rtn.solve(weight, format=form, **options)),
                                 ("searched", searched))}  # fmt: skip
    assert lost["searched"] < lost["plain"]
    weighted = rtn.solve(weight, hessian, format=form, grid=grid, importance=hessian.diagonal())
    assert weighted.error < 0.95 * plain


def test_better_settings_are_better():
    weight, hessian = layer()
    plain = gptq.solve(weight, hessian, **PLAIN).error
    assert plain < 0.8 * rtn.solve(weight, hessian, format="int4").error
    assert gptq.solve(weight, hessian).error < plain
    assert gptq.solve(weight, hessian, group_size=32).error < gptq.solve(weight, hessian).error
    assert gptq.solve(weight, hessian, bits=8, group_size=-1).error < 0.05 * plain


def test_a_mask_is_kept():
    weight, hessian = layer(columns=256)
    mask = torch.rand(weight.shape) > 0.5
    for options in ({}, {"act_order": True}):
        result = gptq.solve(weight, hessian, mask=mask, **options)
        assert not result.weight[~mask].any()
        uncompensated = gptq.solve(weight * mask, hessian, **options).weight
        assert result.error < 0.8 * oracles.error(weight, uncompensated, hessian)


def test_dead_inputs_are_rounded_as_they_are():
    weight, hessian = layer(columns=64)
    hessian[5], hessian[:, 5] = 0, 0
    result = gptq.solve(weight, hessian, **PLAIN)
    scale = weight.abs().amax(1) / 7.5
    assert torch.allclose(result.weight[:, 5], (weight[:, 5] / scale).round().clamp(-8, 7) * scale)


@pytest.mark.parametrize("arguments, words", [
    ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
    ({"bits": 8}, "group_size, symmetric must be -1, True at 8 bits"),
    ({"group_size": 0}, "group_size must be -1"),
    ({"group_size": 12}, "multiple of 8"),
    ({"scales": "dynamic"}, "scales must be one of"),
    ({"scales": "sweep", "act_order": True}, "act_order needs"),
    ({"scales": "sweep", "group_size": 256}, "group_size must be from 1 to block_size"),
    ({"block_size": 0}, "block_size must be positive"),
    ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask must be of the weight's shape"),
])  # fmt: skip
def test_bad_arguments(arguments, words):
    weight, hessian = layer(rows=4, columns=16)
    with pytest.raises(ValueError, match=words):
        gptq.solve(weight, hessian, **arguments)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dead, rank", [(0, 96), (5, 96), (0, 24)])
def test_the_error_is_that_of_the_outputs(act_order, dead, rank):
    """The sweep's own sum against || (W - Q) X ||^2 in float64, also where the inputs leave most
    of the damped Hessian to the damping."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 96), torch.randn(400, rank) @ torch.randn(rank, 96)
    x[:, :dead] = 0
    result = gptq.solve(weight, x.T @ x, group_size=32, act_order=act_order)
    x, weight = x.double(), weight.double()
    want = ((weight - result.weight) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert result.error == pytest.approx(float(want), rel=1e-3)
