"""quant_matmul's NKI kernels in the interpreter against the float64 oracle, on trn2 and trn3."""

import pytest
import torch
from nki_backend import GENERATIONS, backend, interpreting
from test_quant_matmul import backward, check, make, oracle

import genai_perf as gp
from genai_perf.neuron.interpreter import target
from genai_perf.ops.quant_matmul import cases

ROWS = (0, 1, 17, 130)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("weight", cases.WEIGHTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_oracle(generation, weight, dtype):
    if generation == "gen4" and dtype != torch.bfloat16:
        shapes = ((43, 172),)
    else:
        shapes = cases.SHAPES if dtype == torch.float32 else ((3, 33), (130, 300))
    for n, k in shapes:
        x, q, bias = make(max(ROWS), n, k, weight, dtype)
        y64, same = oracle(x, q, bias)
        dense = q.dequantize(torch.float32)
        dy = torch.randn(max(ROWS), n, generator=torch.Generator().manual_seed(2)).to(dtype)
        dx64, dx_same = dy.double() @ dense.double(), dy @ dense.to(dtype)
        with interpreting(generation):
            y = [gp.quant_matmul(x[:m], q, bias, backend="nki") for m in ROWS]
            dx = [backward(dy[:m], q, "nki") for m in ROWS]
        assert [t.shape for t in y] == [(m, n) for m in ROWS] and y[0].dtype == dtype
        check(y, y64, same, f"{n}x{k}")
        check(dx, dx64, dx_same, f"dx {n}x{k}", factor=3)


def test_autograd():
    x, q, bias = make(5, 43, 172, "int8", torch.float32)
    x.requires_grad_()
    with interpreting():
        gp.quant_matmul(x, q, bias, backend="nki").sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(5, -1))


@pytest.mark.parametrize("fmt", ("fp8", "fp8_e5m2"))
def test_every_fp8_code(fmt):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    q = gp.quantize(torch.ones(8, 32), fmt)
    q.qdata = codes.view(8, 32).view(q.qdata.dtype)
    finite = torch.isfinite(q.qdata.float())
    with interpreting():
        got = gp.quant_matmul(torch.eye(32), q, backend="nki").T
    rows = finite.all(1)  # a NaN spoils its row: 0 * NaN
    assert torch.equal(got[rows], q.dequantize()[rows]) and not torch.isfinite(got[~rows]).all()


def estimate(generation: str, kernel, *arguments):
    with target(generation):
        return kernel.estimate(*(backend.to_numpy(a) if isinstance(a, torch.Tensor) else a
                                 for a in arguments))  # fmt: skip


@pytest.mark.parametrize("generation, share", (("gen3", 0.8), ("gen4", 0.7)))
def test_int8_decodes_at_the_rate_of_hbm(generation, share):
    """One token, 4096 x 14336; an estimate, which a change of the kernel must not lower."""
    from genai_perf.ops.quant_matmul.nki.int8_kernel import int8_matmul

    n, k = 4096, 14336
    vector = torch.empty(1, n)
    x, words = torch.empty(1, k, dtype=torch.bfloat16), torch.empty(n, k // 2, dtype=torch.uint16)
    report = estimate(generation, int8_matmul, x, words, vector, vector, False)
    assert report.busiest == "dma" and report.of_bandwidth > share
