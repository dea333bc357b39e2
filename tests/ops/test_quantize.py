"""quantize and dequantize: every backend gives the bits of the reference codecs."""

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import library

import genai_perf as gp
from genai_perf import formats
from genai_perf.ops.quantize.cases import CASES, VARIANTS, make_inputs

native = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bits(tensor):
    tensor = tensor.contiguous().reshape(-1)
    return tensor if not tensor.numel() else tensor.view(torch.uint8)


def assert_same_bits(got, want):
    if isinstance(got, gp.QuantizedTensor):
        assert (got.format, got.shape, got.dtype, got.group_size) == (
            want.format, want.shape, want.dtype, want.group_size)  # fmt: skip
        assert got.components().keys() == want.components().keys()
        for name, tensor in got.components().items():
            other = want.components()[name]
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
            assert torch.equal(bits(tensor), bits(other)), name
    else:
        assert got.dtype == want.dtype and got.shape == want.shape
        nan = got.isnan()
        assert torch.equal(nan, want.isnan())
        assert torch.equal(bits(got.masked_fill(nan, 0)), bits(want.masked_fill(nan, 0)))


def assert_backends_agree(x, format, **options):
    want = gp.quantize(x, format, backend="reference", **options)
    got = gp.quantize(x, format, backend="native", **options)
    assert_same_bits(got, want)
    for dtype in FLOATS:
        dense = gp.dequantize(want, dtype, backend="reference")
        assert_same_bits(gp.dequantize(got, dtype, backend="native"), dense)
        assert options.get("allow_nonfinite") or not dense.isnan().any()
    return want


def test_every_format_has_a_native_kernel():
    for format in formats.FORMATS:
        assert gp.explain(gp.quantize, torch.randn(3, 40), format).backend == "native"


def test_every_code_of_e3m4(isa):
    """Also those that no quantizer writes: infinities, and NaN in every spelling."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    qt = gp.QuantizedTensor("fp8_e3m4", codes.shape, torch.float32, codes,
                            torch.tensor([[1.0], [0.37], [1e-3]]))  # fmt: skip
    for dtype in FLOATS:
        assert_same_bits(gp.dequantize(qt, dtype, backend="native"),
                         gp.dequantize(qt, dtype, backend="reference"))  # fmt: skip


CHECKED = [case for case in CASES if case.tags & {"smoke", "edge"}]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_native_gives_the_bits_of_the_reference(isa, case):
    qt = assert_backends_agree(make_inputs(case), case.format, **case.options)
    qt.check()


ALL = [pytest.param(*variant, id=name) for name, variant in VARIANTS.items()]
# Every magnitude, signed zeros, subnormals, and repeated values, so that ties occur.
WEIGHTS = hnp.arrays(
    "float32",
    hnp.array_shapes(min_dims=1, max_dims=2, max_side=150),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@pytest.mark.parametrize(("format", "options"), ALL)
@settings(max_examples=30, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip
@given(array=WEIGHTS)
def test_any_finite_input(format, options, array):
    x = torch.from_numpy(array.copy())
    if options.get("scale_dtype") is torch.float16:
        x = x.clamp(-1e5, 1e5)
    assert_backends_agree(x, format, **options)


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-20, 1e30, 3e38])
@pytest.mark.parametrize(("format", "options"), ALL)
def test_extreme_magnitudes(isa, format, options, scale):
    x = torch.rand(5, 300, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x *= min(scale, 1e5) if options.get("scale_dtype") is torch.float16 else scale
    assert_backends_agree(x, format, **options)


@pytest.mark.parametrize(("format", "options"), ALL)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,), (0, 3, 5)], ids=str)
def test_empty(format, options, shape):
    qt = assert_backends_agree(torch.empty(shape), format, **options)
    assert gp.dequantize(qt).shape == shape


@pytest.mark.parametrize(("format", "options"), ALL)
def test_zeros(isa, format, options):
    for dtype in FLOATS:
        x = torch.zeros(3, 200, dtype=dtype)
        qt = assert_backends_agree(x, format, **options)
        assert torch.equal(gp.dequantize(qt), x)


@pytest.mark.parametrize(("format", "options"), ALL)
def test_non_contiguous(format, options):
    base = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    for x in (base.T, base[::2, ::3], base[:, :1].expand(200, 70)):
        assert_same_bits(gp.quantize(x, format, **options),
                         gp.quantize(x.contiguous(), format, **options))  # fmt: skip
    qt = gp.quantize(base, format, **options)
    want = gp.dequantize(qt)
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in qt.components().items()}
    for name, tensor in strided.items():
        setattr(qt, name, tensor)
    assert torch.equal(gp.dequantize(qt), want)


@pytest.mark.parametrize(("format", "options"), ALL)
def test_the_number_of_threads_changes_nothing(format, options):
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    many = gp.quantize(x, format, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same_bits(gp.quantize(x, format, **options), many)
        assert torch.equal(gp.dequantize(many), gp.dequantize(many, backend="reference"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", ["int8", "nf4", "int4", "int3", "int2", "fp8", "fp8_e3m4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_outputs(isa, format, dtype):
    x = torch.randn(4096, 2080, generator=torch.Generator().manual_seed(0)).to(dtype)
    qt = gp.quantize(x, format)
    rows = slice(1000, 1100)
    want = gp.dequantize(qt, backend="reference")
    assert_same_bits(gp.dequantize(qt)[rows], want[rows])
    assert torch.equal(gp.dequantize(qt), want)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("format", "options"), ALL)
def test_non_finite_input_is_refused_with_its_place(backend, format, options):
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.zeros(7, 150)
        x[5, 137] = value
        with pytest.raises(ValueError, match=rf"x must be finite, got {value} at \(5, 137\)"):
            gp.quantize(x, format, backend=backend, **options)


def test_fp8_keeps_nan_and_saturates_infinities_when_asked(isa):
    x = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf"), 2.0, -0.5]] * 9)
    for format in ("fp8", "fp8_e5m2", "fp8_e3m4"):
        for granularity in ("row", "tensor", "block"):
            qt = assert_backends_agree(x, format, granularity=granularity, allow_nonfinite=True)
            dense = qt.dequantize()[0]
            assert dense.isnan().tolist() == [False, True, False, False, False, False]
            assert dense[[0, 2, 3, 4, 5]].tolist() == [1.0, 2.0, -2.0, 2.0, -0.5]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_scales_that_fp16_cannot_hold(backend):
    with pytest.raises(ValueError, match="scale_dtype must be wide enough .* a scale of 133333"):
        gp.quantize(torch.full((2, 128), 1e6), "int4", scale_dtype=torch.float16, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference", None])
@pytest.mark.parametrize(("format", "options"), ALL)
def test_opcheck(format, options, backend):
    x = torch.randn(6, 150)
    spec = formats.get(format).spec(**options)
    ops = torch.ops.genai_perf
    library.opcheck(ops.quantize.default, (x, format, *spec), {"backend": backend})
    qt = gp.quantize(x, format, **options)
    codes = qt.qdata.view(torch.uint8) if qt.qdata.is_floating_point() else qt.qdata
    args = (codes, qt.scale, qt.zero_point, qt.nested_scale, qt.scale_offset, format, qt.group_size)
    library.opcheck(ops.dequantize.default, (*args, [6, 150], torch.bfloat16),
                          {"backend": backend})  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="eager")
    def there_and_back(x):
        a = gp.quantize(x, "nf4", double_quant=True)
        b = gp.quantize(x, "int4", group_size=32, symmetric=False)
        return gp.dequantize(a) + gp.dequantize(b, torch.float32), a

    for shape in ((12, 64), (7, 33)):
        x = torch.randn(shape)
        dense, qt = there_and_back(x)
        want = gp.quantize(x, "nf4", double_quant=True)
        assert_same_bits(qt, want)
        other = gp.quantize(x, "int4", group_size=32, symmetric=False)
        assert torch.equal(dense, gp.dequantize(want) + gp.dequantize(other))


def test_compile_with_inductor():
    compiled = torch.compile(lambda x: gp.dequantize(gp.quantize(x, "fp8")) * 2, fullgraph=True)
    x = torch.randn(8, 40)
    assert torch.equal(compiled(x), gp.quantize(x, "fp8").dequantize() * 2)


def test_explain_names_the_backend():
    x = torch.randn(4, 64)
    assert gp.explain(gp.quantize, x, "nf4").backend == "native"
    assert gp.explain(gp.dequantize, gp.quantize(x, "nf4")).backend == "native"


def test_parameters_are_taken_without_their_gradient():
    weight = torch.nn.Parameter(torch.randn(4, 64))
    assert not gp.dequantize(gp.quantize(weight, "int8")).requires_grad


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda x: gp.quantize(x, "int5"), ValueError, "format must be one of 'int8', .*'int5'"),
    (lambda x: gp.quantize(x, "int8", group_size=64), ValueError, "group_size must be left out"),
    (lambda x: gp.quantize(x, "int4", group_size=0), ValueError, "group_size must be -1"),
    (lambda x: gp.quantize(x, "int4", group_size=12), ValueError, "multiple of 8, got 12"),
    (lambda x: gp.quantize(x, "int4", double_quant=True), ValueError, "double_quant must be left"),
    (lambda x: gp.quantize(x, "nf4", group_size=100), ValueError, "group_size must be one of 32"),
    (lambda x: gp.quantize(x, "nf4", symmetric=False), ValueError, "symmetric must be left out"),
    (lambda x: gp.quantize(x, "nf4", allow_nonfinite=True), ValueError, "allow_nonfinite must be"),
    (lambda x: gp.quantize(x, "fp8", granularity="column"), ValueError, "'row', 'block'"),
    (lambda x: gp.quantize(x, "fp8", scale_dtype=torch.int8), ValueError, "scale_dtype must be"),
    (lambda x: gp.quantize(x.double(), "int8"), ValueError, "float64"),
    (lambda x: gp.quantize(x.long(), "int8"), ValueError, "int64"),
    (lambda x: gp.quantize(torch.tensor(1.0), "int8"), ValueError, "one dimension, got a scalar"),
    (lambda x: gp.quantize([1.0], "int8"), TypeError, "x must be a tensor, got list"),
    (lambda x: gp.quantize(x, "int8", backend="gpu"), ValueError, "backend must be one of"),
    (lambda x: gp.dequantize(x), TypeError, "qt must be a QuantizedTensor, got Tensor"),
    (lambda x: gp.dequantize(gp.quantize(x, "int8"), torch.int8), ValueError, "dtype must be"),
])  # fmt: skip
def test_bad_calls_are_refused_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as raised:
        call(torch.randn(4, 64))
    assert "\n" not in str(raised.value)


def test_components_of_another_size_are_refused_before_a_kernel_reads_them():
    for format, name in (("int8", "scale"), ("nf4", "qdata"), ("int4", "scale"), ("fp8", "scale")):
        qt = gp.quantize(torch.randn(16, 256), format)
        setattr(qt, name, getattr(qt, name)[:-1])
        with pytest.raises(gp.CheckpointError, match=f"{name} must be"):
            gp.dequantize(qt, backend="native")
