"""quantize(search=True): the cheapest of the scales that it looks at, never worse than covering."""

import pytest
import torch
from torch import library

import genai_perf as gp
from genai_perf import formats
from genai_perf.nn import QuantConfig, QuantLinear, quantize_model

pytest.importorskip("genai_perf._C", reason="the native extension is not built")
FORMS = ("int4", "int3", "int2")


def make(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.rand(shape[-1], generator=generator) + 0.1


def cost(x, qt, importance):
    """(rows, groups), by float64."""
    error = (qt.dequantize(torch.float32).double() - x.double()).square() * importance.double()
    pad = -x.shape[-1] % qt.group_size if qt.group_size > 0 else 0
    width = qt.group_size if qt.group_size > 0 else x.shape[-1]
    return torch.nn.functional.pad(error, (0, pad)).unflatten(-1, (-1, width)).sum(-1)


def cheapest(x, form, group, symmetric, importance):
    """(rows, groups) float64: every candidate scale, straight from the definition."""
    half = 1 << formats.get(form).bits - 1
    count, step = (33, 0.0125) if form == "int4" else (38, 0.02)
    costs = []
    for part, weight in zip(x.split(group, 1), importance.double().split(group), strict=True):
        high, low = part.amax(1).clamp(min=0), part.amin(1).clamp(max=0)
        tried = []
        for i in range(count):
            shrink = 1.0 - step * i
            top, bottom = high * shrink, low * shrink
            if symmetric:
                scale, zero = torch.maximum(top, -bottom) / (half - 0.5), torch.zeros(len(x))
            else:
                scale = (top - bottom) / (2 * half - 1)
                zero = (-half - bottom / scale).clamp(-half, half - 1).round()
            scale, zero = scale.double()[:, None], zero.double()[:, None]
            codes = ((part.double() / scale).round() + zero).clamp(-half, half - 1)
            tried.append((((codes - zero) * scale - part).square() * weight).sum(1))
        costs.append(torch.stack(tried).amin(0))
    return torch.stack(costs, 1)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_finds_what_a_search_in_float64_finds(form, symmetric, weighted, backend):
    x, importance = make(23, 100)
    given = importance if weighted else None
    importance = importance if weighted else torch.ones(100)
    options = {"group_size": 32, "symmetric": symmetric}
    found = gp.quantize(x, form, search=True, importance=given, backend=backend, **options)
    found.check()
    got = cost(x, found, importance)
    torch.testing.assert_close(got, cheapest(x, form, 32, symmetric, importance),
                               rtol=1e-5, atol=0)  # fmt: skip
    plain = cost(x, gp.quantize(x, form, **options), importance)
    assert (got <= plain * (1 + 1e-5)).all() and got.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_are_rounded_before_they_are_compared(form, dtype):
    x, importance = make(16, 96)
    x = x.to(dtype)
    options = {"group_size": -1, "symmetric": False, "scale_dtype": dtype}
    found = gp.quantize(x, form, search=True, importance=importance, **options)
    assert found.scale.dtype == dtype == found.dtype
    plain = cost(x, gp.quantize(x, form, **options), importance)
    assert (cost(x, found, importance) <= plain * (1 + 1e-5)).all()


def test_importance_moves_the_error_to_where_it_costs_little():
    x, _ = make(64, 128)
    importance = torch.ones(128)
    importance[:16] = 100.0
    even = gp.quantize(x, "int3", search=True).dequantize() - x
    moved = gp.quantize(x, "int3", search=True, importance=importance).dequantize() - x
    assert moved[:, :16].square().sum() < 0.8 * even[:, :16].square().sum()
    assert moved.square().sum() > even.square().sum()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_edges(form, symmetric, backend):
    options = {"search": True, "symmetric": symmetric, "backend": backend}
    for value in (0.0, 1e-45, 1e-40, 3e38, -3e38):
        x = torch.full((3, 200), value)
        x[1] *= torch.linspace(-1, 1, 200)
        back = gp.quantize(x, form, **options).dequantize()
        assert not back.isnan().any() and (value or torch.equal(back, x))
    for shape in ((0, 8), (4, 0), (0,), (5,), (2, 3, 40)):
        qt = gp.quantize(torch.ones(shape), form, **options)
        qt.check()
        assert qt.dequantize().shape == shape
    wide = make(40, 192)[0]
    assert torch.equal(
        gp.quantize(wide[::2, ::3], form, **options).dequantize(),
        gp.quantize(wide[::2, ::3].contiguous(), form, **options).dequantize(),
    )
    wide[7, 3] = torch.nan
    with pytest.raises(ValueError, match=r"x must be finite, got nan at \(7, 3\)"):
        gp.quantize(wide, form, **options)


def test_bad_input():
    x = torch.ones(4, 16)
    for form in ("int8", "nf4", "fp8"):
        with pytest.raises(ValueError, match=f"search must be left out with format '{form}'"):
            gp.quantize(x, form, search=True)
        with pytest.raises(ValueError, match="search must be left out"):
            QuantConfig(form, search=True)
    for importance, what in (
        (torch.ones(15), "floats of shape"),
        (torch.ones(16).int(), "floats"),
        (-torch.ones(16), "at least 0"),
        (torch.ones(16) / 0, "finite"),
    ):
        with pytest.raises(ValueError, match=f"importance must be .*{what}"):
            gp.quantize(x, "int4", search=True, importance=importance)
    with pytest.raises(ValueError, match="importance must be left out without search"):
        gp.quantize(x, "int4", importance=torch.ones(16))
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    with pytest.raises(ValueError, match="importance names '1', which is no layer"):
        quantize_model(model, QuantConfig("int4", search=True), importance={"1": torch.ones(16)})
    with pytest.raises(ValueError, match="quantize_model: 0: quantize: importance must be floats"):
        quantize_model(model, QuantConfig("int4", search=True), importance={"0": torch.ones(1)})


def test_models():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    importance = torch.rand(64)
    config = QuantConfig("int3", group_size=32, search=True)
    model = quantize_model(torch.nn.Sequential(linear), config, importance={"0": importance})
    want = gp.quantize(linear.weight, "int3", group_size=32, search=True, importance=importance)
    assert torch.equal(model[0].weight.qdata, want.qdata)
    assert torch.equal(
        QuantLinear.from_float(linear, config).weight.scale,
        gp.quantize(linear.weight, "int3", group_size=32, search=True).scale,
    )


def test_operator_contract():
    x, importance = make(6, 40)
    args = (x, importance, "int3", 32, False, torch.float32)
    for backend in ("native", "reference"):
        library.opcheck(torch.ops.genai_perf.quantize_searched.default, args, {"backend": backend})
    compiled = torch.compile(lambda x: gp.quantize(x, "int4", search=True).dequantize(),
                             fullgraph=True, backend="eager")  # fmt: skip
    assert torch.equal(compiled(x), gp.quantize(x, "int4", search=True).dequantize())
    assert gp.explain(gp.quantize, x, "int4", search=True).op == "quantize_searched"
