"""CPU kernels in C++ (csrc/cpu/quant_matmul*): few rows fused, many rows by decoded tiles."""

import torch

from ..._backends import native
from ..._dispatch import is_plain
from ...formats.dynamic_map import dynamic_map
from .components import FLOATS, FORMAT_CODES, check_components
from .outliers import multiply
from .rounding import fp8_values

# csrc/cpu/quant_matmul.h holds the same number.
INT8_COLUMNS = 131072  # as many products of two int8 stay within int32


def why_not(x, qdata, scale, zero_point, nested_scale, scale_offset, bias,
            format, group_size, n) -> str | None:  # fmt: skip
    return _no_kernel(format) or native.why_not(
        x, qdata, scale, zero_point, nested_scale, scale_offset, bias
    )


def why_not_backward(dy, qdata, scale, zero_point, nested_scale, scale_offset,
                     format, group_size, k) -> str | None:  # fmt: skip
    return _no_kernel(format) or native.why_not(
        dy, qdata, scale, zero_point, nested_scale, scale_offset
    )


def _no_kernel(format: str) -> str | None:
    return None if format in FORMAT_CODES else f"native has no kernel for {format} weights"


def forward(x, qdata, scale, zero_point, nested_scale, scale_offset, bias, format, group_size, n):
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    return Packed(format, n, x.shape[-1], weight, group_size).forward(x, bias)


def backward(dy, qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, k):
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    return Packed(format, dy.shape[-1], k, weight, group_size).backward(dy)


def why_not_int8(x, qdata, scale, bias) -> str | None:
    return native.why_not(x, qdata, scale, bias)


def int8(x, qdata, scale, bias):
    weight = (qdata, scale, None, None, None)
    return Packed("int8", *qdata.shape, weight, -1).forward(x, bias, int8=True)


def why_not_outliers(x, qdata, scale, bias, threshold) -> str | None:
    return native.why_not(x, qdata, scale, bias)


def outliers(x, qdata, scale, bias, threshold):
    return multiply(x, qdata, scale, bias, threshold, int8)


def why_not_fp8(x, qdata, scale, bias, format, group_size) -> str | None:
    return native.why_not(x, qdata, scale, bias)


def fp8(x, qdata, scale, bias, format, group_size):
    """No CPU multiplies fp8: x is rounded, and what its codes stand for meets W in fp32."""
    packed = Packed(format, *qdata.shape, (qdata, scale, None, None, None), group_size)
    return packed.forward(fp8_values(x, format, group_size), bias).to(x.dtype)


def why_not_int4_int8(x, qdata, scale, zero_point, bias, group_size) -> str | None:
    if group_size > 0 and group_size % 32:
        return f"its groups of int8 activations are multiples of 32, got {group_size}"
    return native.why_not(x, qdata, scale, zero_point, bias)


def int4_int8(x, qdata, scale, zero_point, bias, group_size):
    weight = (qdata, scale, zero_point, None, None)
    packed = Packed("int4", qdata.shape[0], x.shape[-1], weight, group_size)
    return packed.forward(x, bias, int8=True)


def direct(x, qweight, bias, activations) -> torch.Tensor | None:
    """`forward` with what the last call kept in `qweight.packed`, without the op around it.

    None unless everything fits and no gradient is wanted: the long way says why, or records.
    """
    packed = qweight.packed
    if packed is None or not packed.is_of(qweight):
        packed = qweight.packed = _packed(qweight)
    fits = (
        packed is not None and _is_input(x) and x.dim() and x.shape[-1] == packed.k
        and (activations is None or (activations == "int8" and packed.takes_int8))
        and (bias is None or (_is_input(bias) and bias.shape == (packed.n,)))
    )  # fmt: skip
    if not fits:
        return None
    return packed.forward(x, bias, int8=activations is not None)


def _is_input(tensor) -> bool:
    return (
        is_plain(tensor) and tensor.is_cpu and tensor.dtype in FLOATS
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )  # fmt: skip


def _packed(q) -> "Packed | None":
    weight = (q.qdata, q.scale, q.zero_point, q.nested_scale, q.scale_offset)
    plain = all(t is None or is_plain(t) for t in weight)
    if plain and native.why_not(*weight) is None and len(q.shape) == 2 and q.format in FORMAT_CODES:
        for tensor in weight:
            native.gather(tensor)
        return Packed(q.format, *q.shape, weight, q.group_size)
    return None


def _place(tensor) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())


class Packed:
    """A weight whose addresses and sizes have been checked, as the kernels take it.

    A copy, or one that comes out of a pickle, is None: addresses do not travel.
    """

    def __init__(self, format, n, k, weight, group_size):
        check_components(format, n, k, weight, group_size)
        self.n, self.k, self.format, self.group_size = n, k, format, group_size
        self.shape = torch.Size((n, k))
        # Whether there is a kernel for x in int8.
        self.takes_int8 = (
            k <= INT8_COLUMNS if format == "int8"
            else format == "int4" and (group_size == -1 or group_size % 32 == 0)
        )  # fmt: skip
        self.places = [_place(t) for t in weight]
        # Held as long as this: contiguous copies, where a component is a view.
        self.held = [None if t is None else t.contiguous() for t in weight]
        qdata, scale, zero, nested, shift = map(native.pointer, self.held)
        book = None if not nested else dynamic_map()
        self.held.append(book)
        self.weight = native.lib().QuantWeight(
            FORMAT_CODES[format], n, k, qdata, scale,
            0 if nested else native.DTYPE_CODES[self.held[1].dtype],
            zero, nested, native.pointer(book), shift, group_size,
        )  # fmt: skip

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()

    def is_of(self, q) -> bool:
        """Whether nothing of it has changed; a tensor may have been given other memory."""
        qdata, scale, zero, nested, shift = self.places
        return (
            qdata == (q.qdata.data_ptr(), q.qdata.numel())
            and scale == (q.scale.data_ptr(), q.scale.numel())
            and zero == _place(q.zero_point)
            and nested == _place(q.nested_scale)
            and shift == _place(q.scale_offset)
            and q.shape == self.shape
            and q.group_size == self.group_size
            and q.format == self.format
        )

    def forward(self, x, bias, *, int8=False):
        y = x.new_empty(*x.shape[:-1], self.n)
        rows = y.numel() // self.n if self.n else 0
        if rows == 0:
            return y
        if self.k == 0:  # an empty sum
            return y.zero_() if bias is None else y.copy_(bias)
        x = x.contiguous()
        address, dtype = 0, 0
        if bias is not None:
            bias = bias.contiguous()
            address, dtype = bias.data_ptr(), native.DTYPE_CODES[bias.dtype]
        run = self.weight.forward_int8 if int8 else self.weight.forward
        run(rows, x.data_ptr(), y.data_ptr(), native.DTYPE_CODES[x.dtype], address, dtype,
            native.threads())  # fmt: skip
        return y

    def backward(self, dy):
        dx = dy.new_empty((*dy.shape[:-1], self.k))
        if dx.numel() == 0:
            return dx
        if dy.numel() == 0:
            return dx.zero_()
        dy = dy.contiguous()
        self.weight.backward(
            dy.numel() // self.n, dy.data_ptr(), dx.data_ptr(), native.DTYPE_CODES[dy.dtype],
            native.threads(),
        )  # fmt: skip
        return dx
