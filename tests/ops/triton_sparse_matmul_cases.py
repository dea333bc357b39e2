"""The Triton sparse kernels against the float64 oracle; run by test_sparse_matmul_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

import pytest
import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf.ops.sparse_matmul import cases
from genai_perf.testing.numerics import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((1, 1), (3, 33), (9, 300))  # of the last, a row takes two steps of the kernels


def make(m, n, k, layout, values, dtype=torch.float32):
    x, w, bias = cases.make_inputs(cases.Case("", m, n, k, layout, values, dtype, True))
    return x, w, bias, (x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE))


def backward(dy, w, backend):
    return torch.ops.genai_perf.sparse_matmul_backward(
        dy, w.values, w.index, w.row_start, w.scale, w.group_size, w.shape[1], backend=backend
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_oracle(layout, values):
    for n, k in SHAPES:
        dtype = torch.bfloat16 if k == 33 else torch.float32
        for m in (0, 2, 9):
            x, w, bias, there = make(m, n, k, layout, values, dtype)
            dense = w.to_dense(torch.float32)
            y = gp.sparse_matmul(*there, backend="triton").cpu()
            assert y.shape == (m, n) and y.dtype == dtype
            dx = backward(y.to(DEVICE), there[1], "triton").cpu()
            assert dx.shape == (m, k) and dx.dtype == dtype
            if m:
                y64 = x.double() @ dense.double().T + bias.double()
                assert_close_to_oracle(y, y64, F.linear(x, dense.to(dtype), bias), 2)
                assert_close_to_oracle(dx, y.double() @ dense.double(), y @ dense.to(dtype), 3)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_a_unit_vector_reads_the_exact_weight(layout, values):
    _, w, _, (_, there, _) = make(1, 9, 300, layout, values)
    dense = w.to_dense(torch.float32)
    for at in (0, 7, 299):
        x = torch.zeros(2, 300)
        x[-1, at] = 1.0
        y = gp.sparse_matmul(x.to(DEVICE), there, backend="triton").cpu()
        assert torch.equal(y[-1], dense[:, at]) and not y[:-1].any()
    assert torch.equal(backward(torch.eye(9, device=DEVICE), there, "triton").cpu(), dense)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_row_has_the_same_bits_alone_and_among_others(layout):
    _, _, _, (x, w, bias) = make(8, 9, 300, layout, "int4")
    want = gp.sparse_matmul(x, w, bias, backend="triton")
    for rows in (1, 5):
        assert torch.equal(gp.sparse_matmul(x[:rows], w, bias, backend="triton"), want[:rows])


def test_gradients_strides_and_choice():
    x, w, bias, there = make(6, 9, 300, "2:4", "int8")
    x, weight, bias = there
    x = x.T.contiguous().T.requires_grad_()
    y = gp.sparse_matmul(x.view(2, 3, 300), weight, bias)
    (dx,) = torch.autograd.grad(y.sum(), x)
    dense = w.to_dense(torch.float32)
    torch.testing.assert_close(dx.cpu(), dense.sum(0).expand(6, 300))
    assert gp.explain(gp.sparse_matmul, *there).backend == "triton"
