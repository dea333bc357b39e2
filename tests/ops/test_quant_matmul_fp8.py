"""quant_matmul with fp8 activations: against its definition in float64, and the CPU's way to it."""

import pytest
import torch
from torch import library

import genai_perf as gp
from genai_perf.nn import QuantConfig, QuantLinear
from genai_perf.testing.numerics import assert_close_to_oracle

WEIGHTS = [("fp8", "row"), ("fp8", "tensor"), ("fp8", "block"), ("fp8", "group"),
           ("fp8_240", "row"), ("fp8_240", "block")]  # fmt: skip
IDS = ["-".join(weight) for weight in WEIGHTS]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(weight, m, n, k, dtype=torch.float32):
    format, granularity = weight
    generator = torch.Generator().manual_seed(m + n)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]
    x[:, -1] *= 10  # an outlier, which only its own group pays for
    dense = torch.randn(n, k, generator=generator) / k**0.5
    q = gp.quantize(dense, format, granularity=granularity)
    return x.to(dtype), q, torch.randn(n, generator=generator).to(dtype)


def oracle(x, q):
    """In float64 from the definition: what the codes of x stand for times what those of W do."""
    top = 448.0 if q.format == "fp8" else 240.0
    width = 128 if abs(q.group_size) == 128 else x.shape[-1]
    parts = []
    for part in x.float().split(width, -1):
        scale = part.abs().amax(-1, keepdim=True) / top
        parts.append((part / scale).to(torch.float8_e4m3fn).double() * scale.double())
    return torch.cat(parts, -1), q.dequantize(torch.float32).double()


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=IDS)
def test_the_definition(weight, backend):
    for dtype in FLOATS:
        for m, n, k in ((1, 1, 1), (5, 43, 172), (17, 130, 300)):
            x, q, bias = make(weight, m, n, k, dtype)
            seen, w = oracle(x, q)
            exact = seen @ w.T + bias.double()
            same = (seen.float() @ w.float().T + bias.float()).to(dtype)
            got = gp.quant_matmul(x, q, bias, activations="fp8", backend=backend)
            assert got.dtype == dtype
            assert_close_to_oracle(got, exact, same)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=IDS)
def test_rows_without_numbers_and_none(weight, backend):
    x, q, bias = make(weight, 6, 43, 172)
    x[0], x[2, 5], x[3, 171] = 0, torch.nan, -torch.inf
    got = gp.quant_matmul(x, q, bias, activations="fp8", backend=backend)
    assert torch.equal(got[0], bias) and got[2:4].isnan().all()
    assert got[[0, 1, 4, 5]].isfinite().all()
    assert gp.quant_matmul(x[:0], q, bias, activations="fp8", backend=backend).shape == (0, 43)
    empty = gp.quantize(torch.ones(4, 0), weight[0], granularity=weight[1])
    got = gp.quant_matmul(torch.ones(3, 0), empty, activations="fp8", backend=backend)
    assert torch.equal(got, torch.zeros(3, 4))


@pytest.mark.parametrize("weight", [("fp8", "row"), ("fp8", "block")], ids=["row", "block"])
def test_gradients_operator_and_layer(weight):
    x, q, bias = make(weight, 6, 43, 172)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    dy = torch.randn(6, 43, generator=torch.Generator().manual_seed(1))
    y = gp.quant_matmul(x, q, bias, activations="fp8")
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    dense = q.dequantize(torch.float32)
    assert_close_to_oracle(dx, dy.double() @ dense.double(), dy @ dense, factor=3)
    assert_close_to_oracle(dbias, dy.double().sum(0), dy.sum(0), factor=3)
    library.opcheck(
        torch.ops.genai_perf.quant_matmul_fp8.default,
        (x, q.qdata.view(torch.uint8), q.scale, bias, q.format, q.group_size),
    )
    compiled = torch.compile(lambda x: gp.quant_matmul(x, q, activations="fp8"), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    assert torch.equal(compiled(x), gp.quant_matmul(x, q, activations="fp8"))
    linear = torch.nn.Linear(172, 43)
    config = QuantConfig("fp8", granularity=weight[1], activations="fp8")
    layer = QuantLinear.from_float(linear, config)
    want = gp.quant_matmul(x, layer.weight.tensor(), linear.bias, activations="fp8")
    assert torch.equal(layer(x), want) and "activations=fp8" in repr(layer)


def test_what_it_does_not_take_is_said():
    x = torch.ones(2, 172)
    with pytest.raises(ValueError, match="qweight must be fp8 or fp8_240 for fp8 activations"):
        gp.quant_matmul(x, gp.quantize(torch.ones(4, 172), "fp8_e5m2"), activations="fp8")
    with pytest.raises(ValueError, match="activations must be None, or 'int8' with"):
        QuantConfig("int8", activations="fp8")
    with pytest.raises(gp.BackendUnsupported, match="fp8_240 weights by row, got fp8 with 128"):
        weight = gp.quantize(torch.ones(4, 172), "fp8", granularity="block")
        gp.quant_matmul(x, weight, activations="fp8", backend="nki")
