"""gp.quant_matmul: its checks, its ops (forward, also of rounded rows, and gradient), autograd."""

import torch

from ..._checks import check_choice, check_dtype, check_same, check_tensor, fail
from ..._dispatch import Op, native_first
from ...formats import FORMATS, QuantizedTensor
from ..linear import fake_product
from . import native, outliers

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT = ("Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? nested_scale, "
           "Tensor? scale_offset")  # fmt: skip

QUANT_MATMUL = Op(
    __package__,
    "quant_matmul",
    f"(Tensor x, {_WEIGHT}, Tensor? bias, str format, int group_size, SymInt n, "
    "*, str? backend=None) -> Tensor",
    fake=fake_product,
    backends=("cuda", "triton", "nki", "native", "reference"),
)
QUANT_MATMUL_BACKWARD = Op(
    __package__,
    "quant_matmul_backward",
    f"(Tensor dy, {_WEIGHT}, str format, int group_size, SymInt k, *, str? backend=None) -> Tensor",
    fake=fake_product,
    backends=("triton", "nki", "native", "reference"),
    entry="backward",
)


def _rounded(entry: str, backends: tuple[str, ...], option: str = "") -> Op:
    """The op whose rows of x are rounded, which may take more: `option`."""
    return Op(
        __package__,
        f"quant_matmul_{entry}",
        f"(Tensor x, Tensor qdata, Tensor scale, Tensor? bias{option}, *, str? backend=None) "
        "-> Tensor",
        fake=lambda x, qdata, scale, bias, *option, backend=None: x.new_empty(
            (*x.shape[:-1], qdata.shape[0])
        ),
        backends=backends,
        entry=entry,
    )


QUANT_MATMUL_INT8 = _rounded("int8", ("triton", "nki", "native", "reference"))
QUANT_MATMUL_FP8 = _rounded("fp8", ("triton", "nki", "native", "reference"),
                            ", str format, int group_size")  # fmt: skip
# How many columns are outliers depends on the data: an op of its own keeps that out of a graph.
QUANT_MATMUL_OUTLIERS = _rounded("outliers", ("triton", "nki", "native", "reference"),
                                 ", float threshold")  # fmt: skip
QUANT_MATMUL_INT4_INT8 = Op(
    __package__,
    "quant_matmul_int4_int8",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? bias, int group_size, "
    "*, str? backend=None) -> Tensor",
    fake=lambda x, qdata, scale, zero_point, bias, group_size, *, backend=None: x.new_empty(
        (*x.shape[:-1], qdata.shape[0])
    ),
    backends=("native", "reference"),
    entry="int4_int8",
)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, *weight, bias, ctx.format, ctx.group_size, _ = inputs
    ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.backend = keyword_only_inputs["backend"]
    ctx.save_for_backward(*weight)


def _setup_rounded(ctx, inputs, keyword_only_inputs, output):
    x, qdata, scale, bias, *ctx.option = inputs
    kind = ctx.option if len(ctx.option) == 2 else ("int8", -1)  # format, group_size
    weight = (qdata, scale, None, None, None)
    _setup_context(ctx, (x, *weight, bias, *kind, None), keyword_only_inputs, output)


def _straight_through(ctx, dy, bias_at: int):
    """Gradients of x and bias (input `bias_at`), as if x had not been rounded."""
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = QUANT_MATMUL_BACKWARD(dy, *ctx.saved_tensors, ctx.format, ctx.group_size, ctx.k,
                                   backend=ctx.backend)  # fmt: skip
    if ctx.needs_input_grad[bias_at]:
        dbias = dy.reshape(-1, dy.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return dx, dbias


def _backward(ctx, dy):
    dx, dbias = _straight_through(ctx, dy, 6)
    return dx, None, None, None, None, None, dbias, None, None, None


def _backward_rounded(ctx, dy):
    dx, dbias = _straight_through(ctx, dy, 3)
    return dx, None, None, dbias, *(None for _ in ctx.option)


def _setup_int4_int8(ctx, inputs, keyword_only_inputs, output):
    x, qdata, scale, zero, bias, group_size = inputs
    weight = (qdata, scale, zero, None, None)
    _setup_context(ctx, (x, *weight, bias, "int4", group_size, None), keyword_only_inputs, output)


def _backward_int4_int8(ctx, dy):
    dx, dbias = _straight_through(ctx, dy, 4)
    return dx, None, None, None, dbias, None


QUANT_MATMUL.register_autograd(_backward, setup_context=_setup_context, of_reference=True)
QUANT_MATMUL_INT8.register_autograd(_backward_rounded, setup_context=_setup_rounded)
QUANT_MATMUL_OUTLIERS.register_autograd(_backward_rounded, setup_context=_setup_rounded)
QUANT_MATMUL_FP8.register_autograd(_backward_rounded, setup_context=_setup_rounded)
QUANT_MATMUL_INT4_INT8.register_autograd(_backward_int4_int8, setup_context=_setup_int4_int8)


def _check(x, qweight, bias) -> None:
    op = "quant_matmul"
    if not isinstance(qweight, QuantizedTensor):
        raise TypeError(f"{op}: qweight must be a QuantizedTensor, got {type(qweight).__name__}")
    check_tensor(op, x=x)
    if x.dtype not in FLOATS:
        check_dtype(op, FLOATS, x=x)
    if qweight.format not in FORMATS:
        check_choice(op, "qweight.format", qweight.format, tuple(FORMATS))
    if len(qweight.shape) != 2:
        fail(op, "qweight", "of shape (N, K)", f"shape {tuple(qweight.shape)}")
    n, k = qweight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        fail(op, "x", f"(..., {k}) for a weight of shape {(n, k)}", f"shape {tuple(x.shape)}")
    if x.device != qweight.qdata.device:
        check_same(op, "device", x=x, qweight=qweight)
    if bias is None:
        return
    check_tensor(op, bias=bias)
    if bias.dtype not in FLOATS:
        check_dtype(op, FLOATS, bias=bias)
    if bias.dim() != 1 or bias.shape[0] != n:
        fail(op, "bias", f"of shape ({n},)", f"shape {tuple(bias.shape)}")
    if bias.device != x.device:
        check_same(op, "device", x=x, bias=bias)


def quant_matmul(x: torch.Tensor, qweight: QuantizedTensor, bias: torch.Tensor | None = None,
                 *, activations: str | None = None, threshold: float = 0.0,
                 backend: str | None = None) -> torch.Tensor:  # fmt: skip
    """x @ dequant(W)^T + bias without ever holding the dequantized W.

    y[..., n] = sum_k x[..., k] * W[n, k] + bias[n], products and sums in fp32, rounded once.
    The weight gets no gradient; x and bias do.

    With activations="int8" each row of x is rounded to int8 by its largest magnitude, as the format
    int8 has it, and y[..., n] = float(sum_k q[..., k] * qdata[n, k]) * scale[n] * scale[...],
    plus bias[n]; the sum is exact in int32, so that every backend and instruction set gives the
    same bits. A row of x with an infinity or NaN gives NaN; the gradient passes straight through.
    For a weight in int4 the same by groups g of its columns, those that share a scale of W:
    y[..., n] = sum_g float(sum_{k in g} q[..., k] * (qdata[n, k] - zero[n, g])) * scale[n, g] *
    scale[..., g] + bias[n], each group of a row of x rounded by its own largest magnitude; sums
    over k are exact, those over g in fp32.
    With activations="fp8" the same in fp8, as W is, with sums in fp32: rows of x share a scale if
    rows of W do, or all of W does; 128 columns of a row of x share one if W has a scale for 128 x
    128 or 1 x 128 elements, and sums of 128 products meet their scales before they are added.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        qweight: W of shape (N, K), in any format of `genai_perf.formats`.
        bias: (N), fp32, bf16 or fp16, or None.
        activations: None: as they are; or "int8", for a weight in int8 with K at most 131072, or in
            int4; or "fp8", for a weight in fp8 or fp8_240.
        threshold: with activations="int8" and int8 weights: a column of x that holds this
            magnitude or more in any row is not rounded, and meets the dequantized column of W in
            fp32 (LLM.int8; 6.0 is its choice). 0: none.
        backend: "cuda", "triton", "nki", "native" or "reference"; None takes the first that can run
            the call.

    Returns:
        (..., N), of the dtype of x. The same bits for any number of threads, and for a row of x
        alone or among up to 8 rows, or among any number above 8.

    Raises:
        ValueError: a shape, dtype, device or format does not fit, or `activations` does not.
        BackendUnsupported: the named backend cannot run this call.

    Source: QLoRA, arXiv:2305.14314, section 3 (a product over stored 4-bit weights); LLM.int8(),
    arXiv:2208.07339, section 2 (rows of x and W in int8); groups of x in int8 as onnxruntime's
    MatMulNBits has them at accuracy level 4; fp8 in blocks, DeepSeek-V3, arXiv:2412.19437, section
    3.3.2.
    """
    if (
        backend is None
        and not threshold
        and native_first()
        and isinstance(qweight, QuantizedTensor)
    ):
        y = native.direct(x, qweight, bias, activations)
        if y is not None:
            return y
    _check(x, qweight, bias)
    if activations is not None:
        check_choice("quant_matmul", "activations", activations, ("int8", "fp8"))
    if threshold:
        outliers.check(activations, threshold, qweight.format)
    if activations == "int8" and qweight.format == "int4":
        return QUANT_MATMUL_INT4_INT8(x, qweight.qdata, qweight.scale, qweight.zero_point, bias,
                                      qweight.group_size, backend=backend)  # fmt: skip
    if activations == "int8":
        if qweight.format != "int8" or x.shape[-1] > native.INT8_COLUMNS:
            fail("quant_matmul", "qweight",
                 "int4, or int8 of at most 131072 columns, for int8 activations",
                 f"{qweight.format} of shape {tuple(qweight.shape)}")  # fmt: skip
        weight = qweight.qdata, qweight.scale
        if threshold:
            return QUANT_MATMUL_OUTLIERS(x, *weight, bias, float(threshold), backend=backend)
        return QUANT_MATMUL_INT8(x, *weight, bias, backend=backend)
    if activations == "fp8":
        if qweight.format not in ("fp8", "fp8_240"):
            fail("quant_matmul", "qweight", "fp8 or fp8_240 for fp8 activations", qweight.format)
        return QUANT_MATMUL_FP8(x, qweight.qdata.view(torch.uint8), qweight.scale, bias,
                                qweight.format, qweight.group_size, backend=backend)  # fmt: skip
    # fp8 codes pass as bytes: torch cannot compare fp8 tensors, which opcheck does.
    codes = qweight.qdata.view(torch.uint8) if qweight.qdata.is_floating_point() else qweight.qdata
    return QUANT_MATMUL(x, codes, qweight.scale, qweight.zero_point, qweight.nested_scale,
                        qweight.scale_offset, bias, qweight.format, qweight.group_size,
                        qweight.shape[0], backend=backend)  # fmt: skip
