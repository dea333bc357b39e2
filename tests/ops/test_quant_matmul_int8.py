"""quant_matmul with int8 activations: exact sums, so every comparison is one of bits."""

import pytest
import torch
from torch import library

import genai_perf as gp
from genai_perf.nn import QuantConfig, QuantLinear, quantize_model
from genai_perf.testing.numerics import assert_close_to_oracle

_C = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(m, n, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-3, 3, m)[:, None]
    weight = gp.quantize(torch.randn(n, k, generator=generator), "int8")
    return x.to(dtype), weight, torch.randn(n, generator=generator)


def oracle(x, weight):
    """In float64 from the definition."""
    x = x.double()
    absmax = x.abs().amax(-1, keepdim=True)
    q = (x.float() * (absmax.float().reciprocal() * 127)).round().double()
    assert q.abs().max() == 127
    sums = q @ weight.qdata.double().T
    return sums * weight.scale.double().T * (absmax / 127)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (43, 172), (70, 64), (130, 300), (33, 1100)])
def test_same_bits_as_the_reference(isa, shape, dtype):
    for m in (1, 2, 3, 4, 7, 16, 17, 29, 64):
        x, weight, bias = make(m, *shape, dtype)
        weight.qdata[0, 0] = -128  # not ours, but a checkpoint may hold it
        for b in (bias.to(dtype), None):
            got, want = (
                gp.quant_matmul(x, weight, b, activations="int8", backend=backend)
                for backend in ("native", "reference")
            )
            assert got.dtype == dtype and torch.equal(got, want)


def test_reference_against_the_definition():
    for m, n, k in ((5, 43, 172), (2, 3, 4096)):
        x, weight, _ = make(m, n, k)
        got = gp.quant_matmul(x, weight, activations="int8", backend="reference").double()
        want = oracle(x, weight)
        # The scale of x, the sum and two products are rounded once each.
        assert ((got - want).abs() <= 4 * 2.0**-24 * want.abs()).all()


def test_largest_sums_are_exact(isa):
    """Every product at its largest, up to the last column that is allowed; one more is refused."""
    k = 131072
    x = torch.ones(17, k)
    for code in (127, -127, -128):
        weight = gp.quantize(torch.ones(2, k), "int8")
        weight.qdata.fill_(code)
        for rows in (1, 17):
            got = gp.quant_matmul(x[:rows], weight, activations="int8", backend="native")
            sums = torch.full((rows, 2), 127.0 * code * k, dtype=torch.float64).float()
            assert torch.equal(got, sums * weight.scale.T * (torch.ones(()) / 127))
    with pytest.raises(ValueError, match="at most 131072 columns, for int8 activations"):
        gp.quant_matmul(torch.ones(1, k + 1), gp.quantize(torch.ones(1, k + 1), "int8"),
                        activations="int8")  # fmt: skip


@pytest.mark.parametrize("most", [9, 64, 90, 116, 127, 128])
def test_sums_are_exact_whatever_the_codes_have_in_common(isa, most):
    """16-bit sums must neither saturate nor overflow: x like a row of W, its signs, or the same."""
    generator = torch.Generator().manual_seed(most)
    weight = gp.quantize(torch.ones(37, 300), "int8")
    codes = torch.randint(-most, most + 1, weight.shape, generator=generator).clamp(max=127)
    weight.qdata.copy_(codes)
    like = codes[:9].float()
    signs = torch.tensor([1.0, -1.0]).repeat(150)
    noise = torch.rand(9, 300, generator=generator) * 2 - 1
    weight.qdata[9] = signs.clamp(max=127 / most) * most  # the largest of both signs, by turns
    steps = signs * torch.arange(58, 128)[:, None]  # sums of two on either side of any bound
    steps[:, -1] = 127
    for x in (like, -like, like.sign(), noise, noise.sign(), signs.expand(9, -1), noise.abs(),
              steps):  # fmt: skip
        x = torch.cat([x, like * 0.01, x])  # with rows that bounds have to leave alone
        got = gp.quant_matmul(x, weight, activations="int8", backend="native")
        assert torch.equal(got, gp.quant_matmul(x, weight, activations="int8", backend="reference"))


def test_rows_of_zeros_tiny_and_not_finite(isa):
    x, weight, bias = make(6, 43, 172)
    x[0], x[1], x[2, 5], x[3, 171] = 0, x[1] * 1e-42, torch.nan, -torch.inf
    for rows in (x, x.repeat(4, 1)):
        got = gp.quant_matmul(rows, weight, bias, activations="int8", backend="native")
        want = gp.quant_matmul(rows, weight, bias, activations="int8", backend="reference")
        assert torch.equal(got.nan_to_num(7e9), want.nan_to_num(7e9))
        assert torch.equal(got[0], bias) and got[2:4].isnan().all()
        assert got[[0, 1, 4, 5]].isfinite().all()
    empty = gp.quant_matmul(x[:0], weight, bias, activations="int8")
    assert empty.shape == (0, 43)


def test_any_threads_any_strides_any_neighbours():
    x, weight, bias = make(40, 600, 640)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = gp.quant_matmul(x, weight, bias, activations="int8")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gp.quant_matmul(x, weight, bias, activations="int8"), want)
    assert torch.equal(gp.quant_matmul(x[7], weight, bias, activations="int8"), want[7])
    spread = x.view(5, 8, 640).transpose(0, 1)
    got = gp.quant_matmul(spread, weight, bias, activations="int8")
    assert torch.equal(got, want.view(5, 8, 600).transpose(0, 1))


def test_gradients_go_straight_through():
    x, weight, bias = make(6, 43, 172)
    x, bias = x.view(2, 3, 172).requires_grad_(), bias.requires_grad_()
    dy = torch.randn(2, 3, 43, generator=torch.Generator().manual_seed(1))
    y = gp.quant_matmul(x, weight, bias, activations="int8")
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    dense = weight.dequantize(torch.float32)
    assert_close_to_oracle(dx, dy.double() @ dense.double(), dy @ dense, factor=3)
    assert_close_to_oracle(dbias, dy.double().sum((0, 1)), dy.sum((0, 1)), factor=3)


def test_operator_contract():
    x, weight, bias = make(3, 43, 172)
    library.opcheck(
        torch.ops.genai_perf.quant_matmul_int8.default,
        (x.requires_grad_(), weight.qdata, weight.scale, bias.requires_grad_()),
    )
    compiled = torch.compile(
        lambda x: gp.quant_matmul(x, weight, bias, activations="int8"),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    assert torch.equal(compiled(x), gp.quant_matmul(x, weight, bias, activations="int8"))
    told = gp.explain(gp.quant_matmul, x, weight, activations="int8")
    assert told.op == "quant_matmul_int8" and told.backend == "native"


def test_layers_and_models():
    linear = torch.nn.Linear(64, 48)
    layer = QuantLinear.from_float(linear, QuantConfig("int8", activations="int8"))
    x = torch.randn(5, 64)
    want = gp.quant_matmul(x, layer.weight.tensor(), linear.bias, activations="int8")
    assert torch.equal(layer(x), want) and "activations=int8" in repr(layer)
    assert not torch.equal(layer(x), QuantLinear.from_float(linear, "int8")(x))
    model = quantize_model(torch.nn.Sequential(linear), QuantConfig("int8", activations="int8"))
    assert torch.equal(model(x), want)


def test_bad_choices_are_named():
    x, weight, _ = make(2, 43, 172)
    with pytest.raises(ValueError, match="activations must be one of 'int8', 'fp8', got 'int4'"):
        gp.quant_matmul(x, weight, activations="int4")
    other = gp.quantize(torch.ones(43, 172), "nf4")
    with pytest.raises(ValueError, match=r"must be int4, or int8 .*, got nf4 of shape \(43, 172\)"):
        gp.quant_matmul(x, other, activations="int8")
    with pytest.raises(ValueError, match="activations must be None, or 'int8' with"):
        QuantConfig("nf4", activations="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outlier_columns_are_not_rounded(dtype):
    """LLM.int8 against its parts in float64; the rounding of all columns is far worse."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 256, generator=generator) * 0.05
    q, bias = gp.quantize(dense, "int8"), torch.randn(96, generator=generator)
    x = torch.randn(3, 5, 256, generator=generator)
    x[1, 2, 17], x[0, 0, 200] = 60.0, -45.0
    x = x.to(dtype).requires_grad_()
    y = gp.quant_matmul(x, q, bias, activations="int8", threshold=6.0)
    assert y.dtype == dtype and y.shape == (3, 5, 96)
    rest, w = x.detach().double(), q.dequantize().double()
    outliers = torch.zeros_like(rest)
    outliers[..., [17, 200]] = rest[..., [17, 200]]
    rest = rest - outliers
    codes = gp.quantize(rest.float(), "int8").dequantize().double()
    want = (codes + outliers) @ w.T + bias.double()
    tight = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.double(), want, rtol=tight, atol=tight)
    exact = x.detach().double() @ w.T + bias.double()
    plain = gp.quant_matmul(x.detach(), q, bias, activations="int8").double()
    assert (y.detach().double() - exact).norm() < 0.3 * (plain - exact).norm()
    y.sum().backward()
    torch.testing.assert_close(x.grad.double(), w.sum(0).expand(3, 5, 256), rtol=tight, atol=tight)
    below = gp.quant_matmul(x.detach(), q, bias, activations="int8", threshold=1e3)
    assert torch.equal(below.double(), plain)


def test_outliers_as_bitsandbytes_has_them():
    """Its path on a CPU does not round activations, so that the two differ by that rounding."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64).half()
    theirs = bnb.nn.Linear8bitLt(256, 64, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    x = torch.randn(9, 256)
    x[4, 7], x[2, 100] = 50.0, -30.0
    config = gp.nn.QuantConfig("int8", activations="int8", threshold=6.0)
    ours = gp.QuantLinear.from_float(linear, config)
    with torch.no_grad():
        got, want = ours(x.half()).float(), theirs(x.half()).float()
        plain = gp.QuantLinear.from_float(
            linear, gp.nn.QuantConfig("int8", activations="int8"))(x.half()).float()  # fmt: skip
        exact = x @ ours.weight.tensor().dequantize(torch.float32).T + linear.bias.float()
    assert (got - want).norm() < 0.01 * want.norm()
    assert (plain - exact).norm() > 2 * (got - exact).norm()


def test_a_layer_with_a_threshold_compiles_whole():
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40)
    layer = QuantLinear.from_float(linear, QuantConfig("int8", activations="int8", threshold=6.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for columns in ([3, 90], [], [5]):  # one graph for any number of outliers
        x = torch.randn(4, 96).clamp(-5, 5)
        x[1, columns] = 20.0
        x.requires_grad_()
        want, got = layer(x), compiled(x)
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got.sum(), x)[0],
                           torch.autograd.grad(want.sum(), x)[0])  # fmt: skip
        qweight, bias = layer.weight.tensor(), linear.bias
        for backend in ("native", "reference"):
            library.opcheck(
                torch.ops.genai_perf.quant_matmul_outliers.default,
                (x, qweight.qdata, qweight.scale, bias, 6.0), {"backend": backend},
            )  # fmt: skip
    told = gp.explain(layer, x)
    assert told.op == "quant_matmul_outliers" and told.backend == "native"
    assert "threshold=6.0" in repr(layer)


def test_a_threshold_needs_int8_activations():
    q = gp.quantize(torch.randn(4, 8), "int8")
    for options in ({"threshold": 6.0}, {"threshold": -1.0, "activations": "int8"}):
        with pytest.raises(
            ValueError, match="threshold must be 0, or more with activations='int8'"
        ):
            gp.quant_matmul(torch.randn(2, 8), q, **options)
    with pytest.raises(ValueError, match="threshold must be"):
        gp.nn.QuantConfig("nf4", threshold=6.0)
