"""quant_matmul of int4 weights with int8 activations: x rounded by groups, exact sums in each."""

import pytest
import torch
from torch import library

import genai_perf as gp
from genai_perf.nn import QuantConfig, QuantLinear, quantize_model
from genai_perf.testing.memory import guarded
from genai_perf.testing.numerics import assert_close_to_oracle

_C = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = {
    "g128": {},
    "g128-asymmetric": {"symmetric": False},
    "g64-bf16": {"group_size": 64, "scale_dtype": torch.bfloat16},
    "g32-asymmetric": {"group_size": 32, "symmetric": False},
    "g96-asymmetric-fp16": {"group_size": 96, "symmetric": False, "scale_dtype": torch.float16},
    "g256": {"group_size": 256},
    "row-asymmetric": {"group_size": -1, "symmetric": False},
}
ROWS = (1, 2, 3, 4, 5, 8, 9, 11, 30, 270)  # both sides of the limits between kernels and tiles


def make(m, n, k, options, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    weight = gp.quantize(torch.randn(n, k, generator=generator) + 0.3, "int4", **options)
    return x.to(dtype), weight, torch.randn(n, generator=generator).to(dtype)


def seen(x, weight):
    """x as the product sees it, in float64: int8 by groups, from the definition."""
    g = weight.group_size if weight.group_size > 0 else x.shape[-1]
    parts = []
    for part in x.float().split(g, -1):
        absmax = part.abs().amax(-1, keepdim=True)
        codes = (part * (absmax.reciprocal() * 127)).round()
        assert codes.abs().max() == 127
        parts.append(codes.double() * absmax.double() / 127)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_against_float64(isa, weight, dtype):
    for n, k in ((1, 1), (43, 172), (70, 64), (33, 1101), (130, 384)):
        for m in ROWS:
            x, q, bias = make(m, n, k, WEIGHTS[weight], dtype)
            got = gp.quant_matmul(x, q, bias, activations="int8", backend="native")
            dense, rounded = q.dequantize(torch.float32), seen(x, q)
            want = rounded @ dense.double().T + bias.double()
            same = (rounded.float() @ dense.T + bias.float()).to(dtype)
            assert got.dtype == dtype
            assert_close_to_oracle(got, want, same, factor=2)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_reference_against_float64(weight):
    x, q, bias = make(5, 43, 1101, WEIGHTS[weight])
    got = gp.quant_matmul(x, q, bias, activations="int8", backend="reference")
    dense, rounded = q.dequantize(torch.float32), seen(x, q)
    want, same = rounded @ dense.double().T + bias.double(), rounded.float() @ dense.T + bias
    assert_close_to_oracle(got, want, same, factor=2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_within_a_group_are_exact(isa, symmetric):
    """One group and scales of one: the sum of the integers, to the bit, at its largest too."""
    generator = torch.Generator().manual_seed(0)
    for g in (32, 64, 128):
        q = gp.quantize(torch.randn(40, g, generator=generator), "int4", group_size=g,
                        symmetric=symmetric)  # fmt: skip
        codes = torch.randint(-127, 128, (40, g), generator=generator).float()
        codes[:, 0], codes[0], q.qdata[0], q.qdata[1] = 127, 127, 255, 0
        q.scale.fill_(127)  # the scale of x is 1 / 127 times this, rounded once
        if not symmetric:
            q.zero_point[0], q.zero_point[1] = 0, 15
        want = (codes.double() @ q.dequantize(torch.float32).double().T / 127).float()
        for m in (1, 3, 40):
            x = codes[:m] / 127  # codes come back: the largest magnitude of a row is 1
            got = gp.quant_matmul(x, q, activations="int8", backend="native")
            unit = torch.tensor(127.0) * (torch.ones(()) / 127)
            assert unit == 1 and torch.equal(got, want[:m])


def test_onnxruntime_rounds_alike(isa):
    """MatMulNBits at accuracy level 4 is the same product but for the order of its sums."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from genai_perf.bench.peers.onnxruntime import _session

    for m in (1, 20):
        x, q, _ = make(m, 64, 512, {})
        theirs = torch.from_numpy(_session(q, 4).run(None, {"x": x.numpy()})[0])
        ours = gp.quant_matmul(x, q, activations="int8")
        exact = gp.quant_matmul(x, q)
        assert (ours - theirs).norm(dim=1).max() < (ours - exact).norm(dim=1).max() * 2
        assert ((ours - theirs).norm(dim=1) < 0.01 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("weight", ["g128-asymmetric", "g32-asymmetric"])
def test_threads_strides_neighbours_and_repeats(isa, weight):
    x, q, bias = make(40, 600, 640, WEIGHTS[weight])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        many, few = (gp.quant_matmul(part, q, bias, activations="int8") for part in (x, x[:8]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gp.quant_matmul(x, q, bias, activations="int8"), many)
    assert torch.equal(gp.quant_matmul(x[11:20], q, bias, activations="int8"), many[11:20])
    for i in range(8):
        assert torch.equal(gp.quant_matmul(x[i], q, bias, activations="int8"), few[i])
    spread = x.view(5, 8, 640).transpose(0, 1)
    got = gp.quant_matmul(spread, q, bias, activations="int8")
    assert torch.equal(got, many.view(5, 8, 600).transpose(0, 1))


def test_groups_of_zeros_tiny_and_not_finite(isa):
    x, q, bias = make(6, 43, 300, {})
    x[0], x[1], x[2, 5], x[3, 299] = 0, x[1] * 1e-40, torch.nan, -torch.inf
    x[4, 128:256] = 0
    for rows in (x, x.repeat(4, 1)):
        got = gp.quant_matmul(rows, q, bias, activations="int8", backend="native")
        want = gp.quant_matmul(rows, q, bias, activations="int8", backend="reference")
        assert torch.equal(got[0], bias) and got[2:4].isnan().all()
        finite = [0, 1, 4, 5]
        torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-5)
        assert want[2:4].isnan().all()
    assert gp.quant_matmul(x[:0], q, bias, activations="int8").shape == (0, 43)


@pytest.mark.parametrize("m", [1, 4, 20])
def test_nothing_is_written_beside_the_output(isa, m):
    """Reads are held to their buffers by csrc/tests, between unmapped pages."""
    x, q, bias = make(m, 43, 172, WEIGHTS["g32-asymmetric"])
    want = gp.quant_matmul(x, q, bias, activations="int8", backend="native")
    with guarded():
        got = gp.quant_matmul(x, q, bias, activations="int8", backend="native")
    assert torch.equal(got, want)


def test_gradients_go_straight_through():
    x, q, bias = make(6, 43, 172, {})
    x, bias = x.view(2, 3, 172).requires_grad_(), bias.requires_grad_()
    dy = torch.randn(2, 3, 43, generator=torch.Generator().manual_seed(1))
    dx, dbias = torch.autograd.grad(gp.quant_matmul(x, q, bias, activations="int8"), (x, bias), dy)
    dense = q.dequantize(torch.float32)
    assert_close_to_oracle(dx, dy.double() @ dense.double(), dy @ dense, factor=3)
    assert_close_to_oracle(dbias, dy.double().sum((0, 1)), dy.sum((0, 1)), factor=3)


def test_operator_contract():
    x, q, bias = make(3, 43, 172, {"symmetric": False})
    library.opcheck(
        torch.ops.genai_perf.quant_matmul_int4_int8.default,
        (x.requires_grad_(), q.qdata, q.scale, q.zero_point, bias.requires_grad_(), 128),
    )
    compiled = torch.compile(
        lambda x: gp.quant_matmul(x, q, bias, activations="int8"),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    assert torch.equal(compiled(x), gp.quant_matmul(x, q, bias, activations="int8"))
    told = gp.explain(gp.quant_matmul, x, q, activations="int8")
    assert told.op == "quant_matmul_int4_int8" and told.backend == "native"


def test_layers_and_models():
    linear = torch.nn.Linear(256, 48)
    config = QuantConfig("int4", activations="int8")
    layer, x = QuantLinear.from_float(linear, config), torch.randn(5, 256)
    want = gp.quant_matmul(x, layer.weight.tensor(), linear.bias, activations="int8")
    assert torch.equal(layer(x), want) and "activations=int8" in repr(layer)
    assert not torch.equal(layer(x), QuantLinear.from_float(linear, "int4")(x))
    model = quantize_model(torch.nn.Sequential(linear), config, strict=True)
    assert torch.equal(model(x), want)


def test_what_has_no_kernel_is_named():
    x, q, _ = make(2, 43, 172, {"group_size": 24})
    with pytest.raises(gp.BackendUnsupported, match="multiples of 32, got 24"):
        gp.quant_matmul(x, q, activations="int8", backend="native")
    got = gp.quant_matmul(x, q, activations="int8")
    assert torch.equal(got, gp.quant_matmul(x, q, activations="int8", backend="reference"))
    with pytest.raises(ValueError, match="threshold must be .* and int8 weights, got 6.0 with"):
        gp.quant_matmul(x, q, activations="int8", threshold=6.0)
    with pytest.raises(ValueError, match="threshold must be"):
        QuantConfig("int4", activations="int8", threshold=6.0)
    with pytest.raises(
        ValueError, match="activations must be None, or 'int8' with the format int8"
    ):
        QuantConfig("nf4", activations="int8")
