"""sparse_matmul against a float64 product with the stored weight."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import library

import genai_perf as gp
from genai_perf.formats import sparse, sparse24
from genai_perf.ops.sparse_matmul import cases, semi_structured
from genai_perf.testing.numerics import assert_close_to_oracle

_C = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(m, n, k, layout="2:4", values="bfloat16", dtype=torch.float32, bias=True, seed=0):
    return cases.make_inputs(cases.Case("", m, n, k, layout, values, dtype, bias), seed=seed)


def backward(dy, w, backend="native"):
    return torch.ops.genai_perf.sparse_matmul_backward(
        dy, w.values, w.index, w.row_start, w.scale, w.group_size, w.shape[1], backend=backend
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_oracle(isa, layout, values):
    for n, k in cases.SHAPES:
        for dtype in FLOATS if (n, k) == (43, 172) else FLOATS[:1]:
            rows = max(cases.ROWS)
            x, w, bias = make(rows, n, k, layout, values, dtype)
            dense = w.to_dense(torch.float32)
            y64 = x.double() @ dense.double().T + bias.double()
            same = F.linear(x, dense.to(dtype), bias)
            dy = torch.randn(rows, n, generator=torch.Generator().manual_seed(2)).to(dtype)
            got = [gp.sparse_matmul(x[:m], w, bias, backend="native") for m in cases.ROWS]
            assert [t.shape for t in got] == [(m, n) for m in cases.ROWS] and got[0].dtype == dtype
            for m, y in zip(cases.ROWS, got, strict=True):
                rest = same[m:].double()  # torch's error over all rows: that of one can be 0
                assert_close_to_oracle(torch.cat([y.double(), rest]).to(dtype),
                                       torch.cat([y64[:m], rest]), same, 2)  # fmt: skip
            dx = backward(dy, w)
            assert dx.dtype == dtype and dx.shape == (rows, k)
            assert_close_to_oracle(dx, dy.double() @ dense.double(), dy @ dense.to(dtype), 3)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_a_unit_vector_reads_the_exact_weight(isa, layout, values):
    _, w, _ = make(1, 43, 172, layout, values)
    dense = w.to_dense(torch.float32)
    for m in (1, 3, 20):
        for at in (0, 7, 100, 171):
            x = torch.zeros(m, 172)
            x[-1, at] = 1.0
            y = gp.sparse_matmul(x, w, backend="native")
            assert torch.equal(y[-1], dense[:, at]) and not y[:-1].any()
    assert torch.equal(backward(torch.eye(43), w), dense)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", ["bfloat16", "int4"])
@pytest.mark.parametrize("shape", [(43, 172), (512, 1100)], ids=str)
def test_same_bits_for_any_threads_and_rows(isa, layout, values, shape):
    x, w, bias = make(8, *shape, layout, values)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gp.sparse_matmul(x, w, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    for rows in (1, 2, 3, 5):
        assert torch.equal(gp.sparse_matmul(x[:rows], w, bias), results[0][:rows])


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_neighbouring_memory_is_not_used(isa, layout, values):
    """Every buffer is followed by poison: NaN, or bytes of large codes."""
    for n, k in ((43, 172), (3, 33), (5, 64)):
        x, w, bias = make(3, n, k, layout, values)
        want = gp.sparse_matmul(x, w, bias)
        poisoned = {name: walled(tensor) for name, tensor in w.components().items()}
        inside = replace(w, **poisoned)
        assert torch.equal(gp.sparse_matmul(walled(x), inside, walled(bias)), want)
        assert torch.equal(backward(walled(want), inside), backward(want, w))


def walled(tensor):
    nan = tensor.is_floating_point()
    flat = torch.full((tensor.numel() + 128,), float("nan") if nan else 127).to(tensor.dtype)
    inner = flat[64 : 64 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


@pytest.mark.parametrize("kept", [0.0, 0.02, 1.0])
def test_nearly_empty_and_full_rows(isa, kept):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(30, 99, generator=generator) * (torch.rand(30, 99) < kept)
    dense[29] = 0
    x = torch.randn(2, 99, generator=generator)
    for kind in (torch.float32, torch.bfloat16):
        w = sparse.pack(dense.to(kind))
        torch.testing.assert_close(gp.sparse_matmul(x, w), x @ dense.to(kind).float().T)


def test_shapes_strides_and_empties():
    x, w, bias = make(24, 43, 172)
    want = gp.sparse_matmul(x, w, bias)
    assert torch.equal(gp.sparse_matmul(x.view(2, 3, 4, 172), w, bias), want.view(2, 3, 4, 43))
    assert torch.equal(gp.sparse_matmul(x.T.contiguous().T, w, bias), want)
    assert gp.sparse_matmul(x[0], w, bias).shape == (43,)
    assert gp.sparse_matmul(x[:0].view(0, 3, 172), w, bias).shape == (0, 3, 43)
    for pack in (sparse.pack, sparse24.pack):
        for n, k in ((0, 64), (4, 0)):
            y = gp.sparse_matmul(torch.randn(3, k), pack(torch.zeros(n, k)), torch.ones(n))
            assert torch.equal(y, torch.ones(3, n))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("m", [2, 20])
def test_gradients_opcheck_and_compile(layout, m):
    x, w, bias = make(m, 43, 172, layout, "int8")
    x, bias = x.requires_grad_(), bias.requires_grad_()
    dy = torch.randn(m, 43)
    dx, dbias = torch.autograd.grad(gp.sparse_matmul(x, w, bias), (x, bias), dy)
    torch.testing.assert_close(dx, dy @ w.to_dense(torch.float32))
    torch.testing.assert_close(dbias, dy.sum(0))
    args = (w.values, w.index, w.row_start, w.scale)
    library.opcheck(torch.ops.genai_perf.sparse_matmul.default,
                          (x, *args, bias, w.group_size, 43))  # fmt: skip
    library.opcheck(torch.ops.genai_perf.sparse_matmul_backward.default,
                          (dy, *args, w.group_size, 172))  # fmt: skip

    def layer(x, bias):
        return gp.sparse_matmul(x * 2, w, bias).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), layer(x, bias))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_reference_agrees(layout, values):
    for m in (3, 20):
        x, w, bias = make(m, 43, 172, layout, values)
        a, b = (gp.sparse_matmul(x, w, bias, backend=name) for name in ("native", "reference"))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(backward(a, w), backward(a, w, "reference"))


@pytest.mark.parametrize("change, message", [
    (lambda x, w, b: (x[:, :171], w, b), r"x must be \(\.\.\., 172\).*got shape \(5, 171\)"),
    (lambda x, w, b: (x.double(), w, b), r"x must be one of .*got torch.float64"),
    (lambda x, w, b: (x, w, b[:42]), r"bias must be of shape \(43,\), got shape \(42,\)"),
    (lambda x, w, b: (x.to("meta"), w, b), r"weight must be of the device of x \(meta\)"),
    (lambda x, w, b: (x, replace(w, values=w.values[:-1]), b), r"values must be as many"),
    (lambda x, w, b: (x, replace(w, values=w.values.double()), b), r"values must be fp32"),
    (lambda x, w, b: (x, replace(w, index=w.index[:-1]), b), r"index must be 946 of"),
    (lambda x, w, b: (x, replace(w, scale=torch.ones(43, 1)), b), r"scale must be 43 for codes"),
    (lambda x, w, b: (x, replace(w, group_size=12), b), r"group_size must be -1"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match="sparse_matmul: " + message):
        gp.sparse_matmul(*change(*make(5, 43, 172)), backend="native")


def test_a_dense_weight_is_refused():
    x, w, _ = make(5, 43, 172)
    with pytest.raises(TypeError, match="weight must be a SparseTensor, got Tensor"):
        gp.sparse_matmul(x, w.to_dense())


def test_native_is_chosen_on_a_cpu():
    x, w, _ = make(5, 43, 172)
    assert gp.explain(gp.sparse_matmul, x, w).backend == "native"


class FakeGpuTensor:
    """What `why_not` reads of a tensor."""

    def __init__(self, shape, dtype=torch.bfloat16, device="cuda:0"):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device(device)

    def numel(self):
        return self.shape.numel()


@pytest.mark.parametrize("change, reason", [
    ({}, None),
    ({"x": FakeGpuTensor((16, 128), device="cpu")}, "needs tensors of an NVIDIA GPU, got cpu"),
    ({"row_start": object()}, "takes the 2:4 layout, got a bitmask"),
    ({"values": FakeGpuTensor((64, 64), torch.int8)}, "got torch.bfloat16 and torch.int8"),
    ({"bias": FakeGpuTensor((64,), torch.float32)}, "a bias of the dtype of x"),
    ({"n": 48}, r"N a multiple of 32 and K of 64, got \(48, 128\)"),
    ({"x": FakeGpuTensor((2, 4, 128))}, "more than 8 rows of x, got 8"),
    ({"capability": (7, 5)}, "compute capability 8.0, got 7.5"),
])  # fmt: skip
def test_semi_structured_is_for_many_rows_on_a_gpu(change, reason, monkeypatch):
    call = {"x": FakeGpuTensor((2, 8, 128)), "values": FakeGpuTensor((64, 64)), "index": None,
            "row_start": None, "scale": None, "bias": None, "group_size": -1, "n": 64,
            "capability": (9, 0)} | change  # fmt: skip
    capability = call.pop("capability")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    got = semi_structured.why_not(*call.values())
    assert got is None if reason is None else re.search(reason, got)


def test_semi_structured_gives_torch_the_weight_once(monkeypatch):
    made = []

    def convert(dense):
        made.append(dense)
        return dense

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(semi_structured, "why_not", lambda *args: None)
    x, w, bias = make(24, 64, 128, "2:4", "float16", torch.float16)
    bias, x = bias.half(), x.view(2, 12, 128).requires_grad_()
    want = F.linear(x, w.to_dense(), bias)
    for _ in range(2):
        y = gp.sparse_matmul(x, w, bias)
        assert torch.equal(y, want)
    assert len(made) == 1 and torch.equal(made[0], w.to_dense())
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(dx, w.to_dense().sum(0).expand(2, 12, 128), rtol=1e-2, atol=1e-2)
    w.values.mul_(2)
    assert torch.equal(gp.sparse_matmul(x, w), F.linear(x, w.to_dense())) and len(made) == 2
