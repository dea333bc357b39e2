"""The public functions, and the three ops on plain tensors under them."""

import torch

from ... import formats
from ..._checks import check_choice, check_same, check_tensor, fail
from ..._dispatch import Op
from ...formats import IntGroups, QuantizedTensor, Spec
from ...formats.base import FLOATS, check_input


def _fake_quantize(x, format, group_size, double_quant, symmetric, scale_dtype, allow_nonfinite):
    spec = Spec(group_size, double_quant, symmetric, scale_dtype, allow_nonfinite)
    layout = formats.get(format).layout(x.shape, spec)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in layout.values()]


def _fake_searched(x, importance, format, group_size, symmetric, scale_dtype):
    return _fake_quantize(x, format, group_size, False, symmetric, scale_dtype, False)


def _fake_dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size,
                     shape, dtype):  # fmt: skip
    return qdata.new_empty(shape, dtype=dtype)


_QUANTIZE = Op(
    __package__,
    "quantize",
    "(Tensor x, str format, int group_size, bool double_quant, bool symmetric, "
    "ScalarType scale_dtype, bool allow_nonfinite, *, str? backend=None) -> Tensor[]",
    fake=lambda *args, backend=None: _fake_quantize(*args),
    backends=("cuda", "triton", "nki", "native", "reference"),
    entry="quantize",
)
_SEARCHED = Op(
    __package__,
    "quantize_searched",
    "(Tensor x, Tensor? importance, str format, int group_size, bool symmetric, "
    "ScalarType scale_dtype, *, str? backend=None) -> Tensor[]",
    fake=lambda *args, backend=None: _fake_searched(*args),
    backends=("native", "reference"),
    entry="searched",
)
_DEQUANTIZE = Op(
    __package__,
    "dequantize",
    "(Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? nested_scale, Tensor? scale_offset, "
    "str format, int group_size, SymInt[] shape, ScalarType dtype, *, str? backend=None) -> Tensor",
    fake=lambda *args, backend=None: _fake_dequantize(*args),
    backends=("cuda", "triton", "nki", "native", "reference"),
    entry="dequantize",
)


def quantize(x: torch.Tensor, format: str, *, group_size: int | None = None,
             double_quant: bool = False, symmetric: bool = True, granularity: str | None = None,
             scale_dtype: torch.dtype | None = None, allow_nonfinite: bool = False,
             search: bool = False, importance: torch.Tensor | None = None,
             backend: str | None = None) -> QuantizedTensor:  # fmt: skip
    """Quantizes `x` along its last dimension.

    Dequantized: `(qdata - zero_point) * scale`; each format's formula stands in
    `genai_perf.formats`. Every backend gives the same bits, but for `search`, where two scales
    whose errors agree to rounding may be told apart differently.

    Args:
        x: (..., K), fp32, bf16 or fp16, finite; a weight is (N, K) = (out_features, in_features).
        format: a name of `genai_perf.formats.FORMATS`: "int8", "fp8", "fp8_e5m2", "fp8_240" (fp8 up
            to 240, as AWS trn1 and trn2 have it), "fp8_e3m4", "nf4", "fp4", "int4", "int3", "int2",
            "dynamic8".
        group_size: elements that share a scale. int4, int3, int2: along a row, a multiple of 8
            (128) or -1 for the row; nf4, fp4 and dynamic8: consecutive ones, a power of two from 32
            to 4096 (64, 64, 256).
        double_quant: nf4 and fp4: hold the scales in 8 bits too, 4.13 bits a weight instead of 4.5.
        symmetric: int4, int3, int2: no zero point.
        granularity: fp8: "tensor", "row" (the default), "group" (128 elements of a row) or "block"
            (128x128).
        scale_dtype: int4, int3, int2: round the scales to this dtype before the codes are computed,
            so that a checkpoint that stores them so is exact (fp32).
        allow_nonfinite: fp8: let infinities saturate and keep NaN, instead of refusing them.
        search: int4, int3, int2: choose the scale of each group among 0.6 (0.26 for 2 and 3 bits)
            to 1.0 of the one that covers it, for the least squared error.
        importance: with search: (K,), at least 0, what a squared error in each column costs, such
            as the mean of the squares that a layer's input has there. None: 1.
        backend: "cuda", "triton", "nki", "native" or "reference" (the last two for search); the
            first that can run it by default.

    Returns:
        QuantizedTensor

    Raises:
        ValueError: unknown format, an option that the format does not have, inf or NaN in `x`, an
            importance that does not fit.
        BackendUnsupported: the named backend cannot run this call.
    """
    chosen = formats.get(format)
    spec = chosen.spec(group_size=group_size, double_quant=double_quant, symmetric=symmetric,
                       granularity=granularity, scale_dtype=scale_dtype,
                       allow_nonfinite=allow_nonfinite)  # fmt: skip
    check_input(x)
    x = x.detach()
    check_search(chosen, search, importance, x)
    if search:
        options = spec.group_size, spec.symmetric, spec.scale_dtype
        tensors = _SEARCHED(x, importance, format, *options, backend=backend)
    else:
        tensors = _QUANTIZE(x, format, *spec, backend=backend)
    names = chosen.layout(x.shape, spec)
    return chosen.assemble(dict(zip(names, tensors, strict=True)), x, spec)


def check_search(chosen: formats.Format, search: bool, importance: torch.Tensor | None = None,
                 x: torch.Tensor | None = None) -> None:  # fmt: skip
    """Raises ValueError where a format has no scales to search for, or `importance` fits neither x
    nor search."""
    if search and not isinstance(chosen, IntGroups):
        fail("quantize", "search", f"left out with format {chosen.name!r} (int4, int3 and int2 "
             "take it)", search)  # fmt: skip
    if importance is None:
        return
    check_tensor("quantize", importance=importance)
    if not search:
        fail("quantize", "importance", "left out without search=True", "one")
    if importance.shape != x.shape[-1:] or not importance.is_floating_point():
        fail("quantize", "importance", f"floats of shape {tuple(x.shape[-1:])}",
             f"{importance.dtype} of shape {tuple(importance.shape)}")  # fmt: skip
    check_same("quantize", "device", x=x, importance=importance)
    if (
        not torch.compiler.is_compiling()
        and not ((importance >= 0) & (importance < torch.inf)).all()
    ):
        fail("quantize", "importance", "at least 0 and finite", "others among it")


def quantize_like(x: torch.Tensor, qt: QuantizedTensor, *,
                  backend: str | None = None) -> QuantizedTensor:  # fmt: skip
    """`x` in the format and with the options of `qt`, its dtype kept.

    Args:
        x: of qt's shape; fp32, bf16 or fp16, finite.

    Raises:
        ValueError: another shape; as `quantize`.
    """
    if x.shape != qt.shape:
        fail("quantize_like", "x", f"of shape {tuple(qt.shape)}", f"shape {tuple(x.shape)}")
    check_input(x)
    chosen, x = formats.get(qt.format), x.detach()
    tensors = _QUANTIZE(x, qt.format, *qt.spec, backend=backend)
    names = chosen.layout(x.shape, qt.spec)
    made = chosen.assemble(dict(zip(names, tensors, strict=True)), x, qt.spec)
    made.dtype = qt.dtype
    return made


def dequantize(qt: QuantizedTensor, dtype: torch.dtype | None = None, *,
               backend: str | None = None) -> torch.Tensor:  # fmt: skip
    """The dense tensor that `qt` stands for: `(qdata - zero_point) * scale` in fp32, rounded once.

    Args:
        qt: what `quantize` gave, or a checkpoint held.
        dtype: fp32, bf16 or fp16; `qt.dtype` by default.
        backend: "cuda", "triton", "nki", "native" or "reference"; the first that can
            run it.

    Returns:
        Tensor: of `qt.shape`.

    Raises:
        TypeError: `qt` is no QuantizedTensor.
        ValueError: another dtype.
        BackendUnsupported: the named backend cannot run this call.
    """
    if not isinstance(qt, QuantizedTensor):
        raise TypeError(f"dequantize: qt must be a QuantizedTensor, got {type(qt).__name__}")
    dtype = dtype or qt.dtype
    check_choice("dequantize", "dtype", dtype, FLOATS)
    # fp8 codes pass as bytes: torch cannot compare fp8 tensors, which opcheck does.
    codes = qt.qdata.view(torch.uint8) if qt.qdata.is_floating_point() else qt.qdata
    return _DEQUANTIZE(codes, qt.scale, qt.zero_point, qt.nested_scale, qt.scale_offset,
                       qt.format, qt.group_size, qt.shape, dtype, backend=backend)  # fmt: skip
