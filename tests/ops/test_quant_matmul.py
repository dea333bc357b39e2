"""quant_matmul against a float64 product with the stored weight, and against other libraries."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import genai_perf as gp
from genai_perf import _dispatch, formats
from genai_perf._backends import native as glue
from genai_perf.formats.nf4 import NF4, code_book
from genai_perf.ops.quant_matmul import cases, native
from genai_perf.testing.numerics import assert_close_to_oracle

_C = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(m, n, k, weight="nf4", dtype=torch.float32, bias=True, seed=0):
    fmt, options = cases.WEIGHTS[weight]
    return cases.make_inputs(cases.Case("", m, n, k, fmt, options, dtype, bias), seed=seed)


def oracle(x, q, bias):
    """float64 of the stored numbers, and torch's own product in the dtype of x."""
    dense = q.dequantize(torch.float32)
    y64 = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    return y64, F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))


def backward(dy, q, backend="native"):
    return torch.ops.genai_perf.quant_matmul_backward(
        dy, q.qdata, q.scale, q.zero_point, q.nested_scale, q.scale_offset, q.format,
        q.group_size, q.shape[1], backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", cases.WEIGHTS)
def test_oracle(isa, weight, dtype):
    for n, k in cases.SHAPES if dtype == torch.float32 else ((3, 33), (43, 172)):
        x, q, bias = make(max(cases.ROWS), n, k, weight, dtype)
        y64, same = oracle(x, q, bias)
        dense = q.dequantize(torch.float32)
        dy = torch.randn(max(cases.ROWS), n, generator=torch.Generator().manual_seed(2)).to(dtype)
        dx64, dx_same = dy.double() @ dense.double(), dy @ dense.to(dtype)
        y = [gp.quant_matmul(x[:m], q, bias, backend="native") for m in cases.ROWS]
        dx = [backward(dy[:m], q) for m in cases.ROWS]
        assert [t.shape for t in y] == [(m, n) for m in cases.ROWS] and y[0].dtype == dtype
        assert [t.shape for t in dx] == [(m, k) for m in cases.ROWS] and dx[0].dtype == dtype
        check(y, y64, same, f"{n}x{k}")
        check(dx, dx64, dx_same, f"dx {n}x{k}", factor=3)


def check(prefixes, ref64, same, name, factor=2):
    """Results for the first 0, 1, 2, ... rows by one yardstick: torch's error over all rows (that
    of one row can be 0 by luck)."""
    rows = [len(prefix) for prefix in prefixes]
    got, want, yard = (torch.cat([t[:m] for t, m in zip(ts, rows, strict=True)])
                       for ts in (prefixes, [ref64] * len(rows), [same] * len(rows)))  # fmt: skip
    assert max(rows) == len(ref64)
    assert_close_to_oracle(got, want, yard, factor, name)


@pytest.mark.parametrize("weight", cases.WEIGHTS)
def test_a_unit_vector_reads_the_exact_weight(isa, weight):
    """Codes and scales stay fp32: one product, so at most the rounding of code * scale."""
    _, q, _ = make(1, 43, 172, weight)
    dense = q.dequantize(torch.float32)
    for m in (1, 3, 20):
        for at in (0, 63, 64, 171):
            x = torch.zeros(m, 172)
            x[-1, at] = 1.0
            y = gp.quant_matmul(x, q, backend="native")
            assert torch.equal(y[-1], dense[:, at])
            assert not y[:-1].any()


@pytest.mark.parametrize("weight", ["nf4-double", "int4-asymmetric", "int8", "fp8", "fp8-block"])
@pytest.mark.parametrize("shape", [(43, 172), (130, 300), (512, 256)], ids=str)
def test_same_bits_for_any_threads_and_batch(isa, weight, shape):
    x, q, bias = make(600, *shape, weight)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((gp.quant_matmul(x, q, bias), gp.quant_matmul(x[:7], q, bias),
                            backward(gp.quant_matmul(x, q), q)))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    many, few, dx = results[0]
    for i in range(7):
        assert torch.equal(gp.quant_matmul(x[i : i + 1], q, bias), few[i : i + 1])
    assert torch.equal(gp.quant_matmul(x[100:109], q, bias), many[100:109])
    assert torch.equal(gp.quant_matmul(x[:591], q, bias), many[:591])
    dy = gp.quant_matmul(x, q)
    assert torch.equal(backward(dy[5:6], q), dx[5:6])


@pytest.mark.parametrize("weight", cases.WEIGHTS)
@pytest.mark.parametrize("m", [1, 4, 20])
def test_neighbouring_memory_is_neither_read_nor_written(isa, weight, m):
    """Every buffer ends where poison begins: NaN, or bytes that decode to the largest codes."""
    for n, k in ((43, 172), (3, 33), (5, 64)):
        x, q, bias = make(m, n, k, weight)
        want = gp.quant_matmul(x, q, bias, backend="native")
        held = {name: walled(t) for name, t in q.components().items()}
        walled_q = replace(q, **{name: inner for name, (inner, _) in held.items()})
        (x_in, _), (b_in, _), (y_in, y_all) = walled(x), walled(bias), walled(want)
        y_in.fill_(float("nan"))
        weight_args = (walled_q.qdata, walled_q.scale, walled_q.zero_point,
                       walled_q.nested_scale, walled_q.scale_offset)  # fmt: skip
        packed = native.Packed(q.format, n, k, weight_args, q.group_size)
        packed.weight.forward(m, x_in.data_ptr(), y_in.data_ptr(), 0, b_in.data_ptr(), 0, 2)
        assert torch.equal(y_in, want)
        before, after = y_all[:64], y_all[64 + want.numel() :]
        assert torch.isnan(before).all() and torch.isnan(after).all()
        dx, _ = walled(x)
        packed.weight.backward(m, y_in.data_ptr(), dx.data_ptr(), 0, 2)
        assert torch.equal(dx, backward(want, q))


def walled(tensor):
    """A copy of `tensor` between 64 elements of poison on each side, and the whole buffer."""
    nan = tensor.dtype in FLOATS
    flat = torch.full((tensor.numel() + 128,), float("nan") if nan else 255).to(tensor.dtype)
    if not nan:
        flat.view(torch.uint8).fill_(255)
    inner = flat[64 : 64 + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, flat


def test_shapes_strides_and_empties(isa):
    x, q, bias = make(24, 43, 172)
    want = gp.quant_matmul(x, q, bias)
    assert torch.equal(gp.quant_matmul(x.view(2, 3, 4, 172), q, bias), want.view(2, 3, 4, 43))
    assert torch.equal(gp.quant_matmul(x.T.contiguous().T, q, bias), want)
    assert torch.equal(gp.quant_matmul(x.repeat(1, 2)[:, :172], q, bias), want)
    row = x[:1].expand(5, 172)
    assert torch.equal(gp.quant_matmul(row, q, bias), gp.quant_matmul(x[:1], q, bias).expand(5, 43))
    assert gp.quant_matmul(x[0], q, bias).shape == (43,)
    assert gp.quant_matmul(x[:0].view(0, 3, 172), q, bias).shape == (0, 3, 43)
    columns = replace(q, qdata=q.qdata.repeat_interleave(2)[::2])
    assert torch.equal(gp.quant_matmul(x, columns, bias), want)
    for m, n, k in ((3, 0, 64), (3, 4, 0)):
        empty = formats.get("int8").quantize(torch.zeros(n, k))
        y = gp.quant_matmul(torch.randn(m, k), empty, torch.ones(n))
        assert torch.equal(y, torch.ones(m, n))


@pytest.mark.parametrize("fmt", ["fp8", "fp8_e5m2", "fp8_e3m4"])
@pytest.mark.parametrize("m", [1, 3, 9])
def test_every_fp8_code(isa, fmt, m):
    """Subnormals exactly; NaN and infinity where the code says so, in their own row alone."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat_interleave(2, 1)
    code_dtype = formats.get(fmt).code_dtype
    q = formats.get(fmt).quantize(torch.ones(16, 32))
    q = replace(q, qdata=codes.view(code_dtype), scale=torch.full((16, 1), 0.5))
    dense = q.dequantize()
    for at in range(32):
        x = torch.zeros(m, 32)
        x[-1, at] = 2.0
        y = gp.quant_matmul(x, q, backend="native")[-1]
        finite = torch.isfinite(dense).all(1)
        assert torch.equal(y[finite], 2 * dense[finite, at])
        assert torch.isnan(y[~finite]).all()  # 0 * NaN and 0 * inf
        dx = backward(torch.eye(16)[at % 16].expand(m, 16).contiguous(), q)[-1]
        poisoned = ~torch.isfinite(dense).all(0)
        assert torch.equal(dx[~poisoned], dense[at % 16][~poisoned])
        assert torch.isnan(dx[poisoned]).all() or torch.isinf(dense[at % 16][poisoned]).any()
    infinite = gp.quant_matmul(torch.ones(m, 32), q, backend="native")
    torch.testing.assert_close(infinite, torch.ones(m, 32) @ dense.T, equal_nan=True)


def test_flushing_subnormals_changes_nothing(isa):
    q = formats.get("fp8").quantize(torch.randn(300, 300))
    q.qdata.view(torch.uint8).bitwise_and_(0x87)  # subnormals alone
    x = torch.randn(2, 300)
    want = gp.quant_matmul(x, q), gp.quant_matmul(x.repeat(10, 1), q)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = gp.quant_matmul(x, q), gp.quant_matmul(x.repeat(10, 1), q)
    finally:
        torch.set_flush_denormal(False)
    assert want[0].abs().min() > 0
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


def test_int4_takes_zero_points_and_codes_from_the_whole_range(isa):
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 8)
    scale, zero = torch.rand(16, 1) + 0.5, torch.arange(16, dtype=torch.uint8)[:, None]
    q = formats.get("int4").quantize(torch.ones(16, 128), symmetric=False)
    q = replace(q, qdata=codes[:, ::2] | codes[:, 1::2] << 4, scale=scale, zero_point=zero)
    x = torch.eye(128)
    dense = (codes.float() - zero.float()) * scale
    assert torch.equal(gp.quant_matmul(x, q, backend="native").T, dense)
    assert torch.equal(torch.cat([gp.quant_matmul(r[None], q) for r in x]).T, dense)


# --- gradients, compilation, contracts -----------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", ["nf4", "int4-asymmetric", "int8", "fp8-block", "fp8_e5m2"])
def test_gradients(weight, dtype):
    x, q, bias = make(6, 43, 172, weight, dtype)
    x = x.view(2, 3, 172).requires_grad_()
    bias = bias.requires_grad_()
    dy = torch.randn(2, 3, 43).to(dtype)
    dx, dbias = torch.autograd.grad(gp.quant_matmul(x, q, bias), (x, bias), dy)
    dense = q.dequantize(torch.float32)
    assert dx.dtype == dtype and dbias.dtype == dtype
    assert_close_to_oracle(dx, dy.double() @ dense.double(), dy @ dense.to(dtype), factor=3)
    assert_close_to_oracle(dbias, dy.double().sum((0, 1)), dy.sum((0, 1)), factor=3)
    frozen = gp.quant_matmul(x, q, bias.detach())
    assert torch.equal(torch.autograd.grad(frozen, x, dy)[0], dx)


@pytest.mark.parametrize("weight", ["nf4-double", "int4-asymmetric", "int8", "fp8"])
def test_opcheck(weight):
    for m in (2, 9):
        x, q, bias = make(m, 43, 172, weight)
        codes = q.qdata.view(torch.uint8) if weight == "fp8" else q.qdata
        args = (codes, q.scale, q.zero_point, q.nested_scale, q.scale_offset)
        library.opcheck(
            torch.ops.genai_perf.quant_matmul.default,
            (x.requires_grad_(), *args, bias.requires_grad_(), q.format, q.group_size, 43),
        )
        library.opcheck(
            torch.ops.genai_perf.quant_matmul_backward.default,
            (torch.randn(m, 43), *args, q.format, q.group_size, 172),
        )


def test_compiles_without_a_graph_break():
    x, q, bias = make(4, 43, 172)
    x.requires_grad_()

    def layer(x, bias):
        return gp.quant_matmul(x * 2, q, bias).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = layer(x, bias), compiled(x, bias)
    assert torch.equal(want, got)
    a, b = (torch.autograd.grad(y.sum(), x)[0] for y in (want, got))
    assert torch.equal(a, b)


class Seen(TorchDispatchMode):
    """The genai_perf operators that torch's dispatcher gets to see."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_dispatcher_is_left_out_only_where_nobody_watches():
    x, q, bias = make(5, 43, 172)
    want = gp.quant_matmul(x, q, bias)
    with Seen() as seen:
        assert torch.equal(gp.quant_matmul(x, q, bias), want)
    assert "genai_perf::quant_matmul" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gp.quant_matmul(x, q, bias)
    assert "genai_perf::quant_matmul" in {event.name for event in profile.events()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = gp.quant_matmul(mode.from_tensor(x), q)
    assert isinstance(fake, FakeTensor) and fake.shape == want.shape
    traced = make_fx(lambda x: gp.quant_matmul(x, q, bias))(x)
    assert "genai_perf.quant_matmul" in traced.code and torch.equal(traced(x), want)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg() and torch.equal(gp.quant_matmul(negated, q, bias), want)


@pytest.mark.parametrize("name", ["qdata", "scale", "zero_point"])
def test_a_weight_may_change_between_calls(name):
    x, q, _ = make(5, 43, 172, "int4-asymmetric")
    gp.quant_matmul(x, q)

    def expect_current():
        want = gp.quant_matmul(x, q, backend="reference")
        torch.testing.assert_close(gp.quant_matmul(x, q), want)
        return want

    first = expect_current()
    getattr(q, name).copy_(torch.flip(getattr(q, name), (0,)))  # in place
    second = expect_current()
    getattr(q, name).data = torch.flip(getattr(q, name), (1,)).contiguous()  # other memory
    third = expect_current()
    setattr(q, name, torch.flip(getattr(q, name), (0,)))  # another tensor
    fourth = expect_current()
    results = (first, second, third, fourth)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))
    setattr(q, name, getattr(q, name)[:-1])
    with pytest.raises(ValueError, match=f"quant_matmul: qweight.{name} must be"):
        gp.quant_matmul(x, q)


def test_copies_and_pickles_leave_addresses_behind():
    x, q, _ = make(5, 43, 172)
    want = gp.quant_matmul(x, q)
    assert q.packed is not None
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert other.packed is None and torch.equal(gp.quant_matmul(x, other), want)
        other.qdata.zero_()
        assert not torch.equal(gp.quant_matmul(x, other), want)
    assert torch.equal(gp.quant_matmul(x, q), want)


def test_the_op_is_asked_where_another_backend_may_come_first(monkeypatch):
    x, q, _ = make(5, 43, 172)
    want = gp.quant_matmul(x, q)
    monkeypatch.setattr(native, "direct", lambda *args: pytest.fail("not asked for"))
    monkeypatch.setattr(_dispatch, "_NATIVE_FIRST", False)
    assert torch.equal(gp.quant_matmul(x, q), want)


def test_reference_backend_agrees():
    for weight in cases.WEIGHTS:
        x, q, bias = make(5, 43, 172, weight)
        a, b = (gp.quant_matmul(x, q, bias, backend=name) for name in ("native", "reference"))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(backward(a, q), backward(a, q, "reference"))


def test_explain_names_native():
    x, q, bias = make(5, 43, 172)
    told = gp.explain(gp.quant_matmul, x, q, bias)
    assert told.backend == "native" and told.reasons["reference"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, q, b: (x[:, :171], q, b), r"x must be \(\.\.\., 172\).*got shape \(5, 171\)"),
        (lambda x, q, b: (x.double(), q, b), r"x must be one of .*got torch.float64"),
        (lambda x, q, b: (x, q, b[:42]), r"bias must be of shape \(43,\), got shape \(42,\)"),
        (lambda x, q, b: (x, q, b[None]), r"bias must be of shape \(43,\), got shape \(1, 43\)"),
        (lambda x, q, b: (x.to("meta"), q, b), r"qweight must be of the device of x \(meta\)"),
        (
            lambda x, q, b: (x, replace(q, shape=torch.Size((43, 2, 86))), b),
            r"qweight must be of shape \(N, K\)",
        ),
        (lambda x, q, b: (x, replace(q, format="int5"), b), r"qweight.format must be one of"),
        (lambda x, q, b: (x, replace(q, qdata=q.qdata[:-1]), b), r"qweight.qdata must be 3698 "),
        (lambda x, q, b: (x, replace(q, scale=q.scale[:-1]), b), r"qweight.scale must be 116 "),
        (lambda x, q, b: (x, replace(q, scale=q.scale.double()), b), r"qweight.scale must be "),
        (lambda x, q, b: (x, replace(q, group_size=24), b), r"group_size must be one of those of"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match="quant_matmul: " + message):
        gp.quant_matmul(*change(*make(5, 43, 172)), backend="native")


def test_other_objects_are_refused():
    x, q, _ = make(5, 43, 172)
    with pytest.raises(TypeError, match="qweight must be a QuantizedTensor, got Tensor"):
        gp.quant_matmul(x, x)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        gp.quant_matmul([1.0], q)


# --- outside judges ------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("m", [1, 20])
def test_bitsandbytes_linear4bit(isa, double, m):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.nn.Linear(256, 96)
    theirs = bnb.nn.Linear4bit(256, 96, compute_dtype=torch.float32, quant_type="nf4",
                               compress_statistics=double)  # fmt: skip
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    x = torch.randn(m, 256)
    state = theirs.weight.quant_state
    q = formats.get("nf4").quantize(dense.weight.detach(), double_quant=double)
    assert torch.equal(q.qdata, theirs.weight.data.view(-1))
    if double:  # their CPU codec of the scales is not exact: take their codes
        q = replace(q, scale=state.absmax, nested_scale=state.state2.absmax,
                    scale_offset=state.offset)  # fmt: skip
    with torch.no_grad():
        want = theirs(x)
    got = gp.quant_matmul(x, q, dense.bias.detach(), backend="native")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [1, 20])
def test_compressed_tensors_int4(isa, symmetric, m):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (48, 256), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 2, generator=generator).bfloat16()
    zero = torch.randint(-8, 8, (48, 2), generator=generator, dtype=torch.int8)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group",
                            group_size=128)  # fmt: skip
    dense = dequantize(codes, scale.float(), None if symmetric else zero.float(), args)
    q = gp.QuantizedTensor(
        "int4", torch.Size((48, 256)), torch.float32,
        pack_to_int32(codes, 4).contiguous().view(torch.uint8), scale,
        None if symmetric else (zero + 8).to(torch.uint8), 128,
    )  # fmt: skip
    q.check()
    x = torch.randn(m, 256, generator=generator)
    assert_close_to_oracle(gp.quant_matmul(x, q, backend="native"),
                           x.double() @ dense.double().T, F.linear(x, dense))  # fmt: skip


def test_code_book_of_the_kernels(isa):
    """csrc/common/codebooks.h against the reference: each code read out by a unit vector."""
    q = formats.get("nf4").quantize(code_book().repeat(4)[None])
    assert tuple(gp.quant_matmul(torch.eye(64)[:16], q)[:, 0].tolist()) == NF4
    assert glue.unavailable() is None


def test_costs_and_tags():
    names = [case.name for case in cases.CASES]
    assert len(names) == len(set(names))
    assert {tag for case in cases.CASES for tag in case.tags} == {
        "smoke", "edge", "grad", "bench", "model"
    }  # fmt: skip
    case = next(c for c in cases.CASES if c.name == "int4-asymmetric-smoke-17")
    flops, moved = cases.cost(case)
    x, q, bias = cases.make_inputs(case)
    assert flops == 2 * 17 * 43 * 172
    assert moved == q.nbytes + x.nbytes + bias.nbytes + 4 * 17 * 43
