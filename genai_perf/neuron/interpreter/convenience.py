"""The functions of nki.language that stand for a few instructions each and return new tiles."""

import numpy as np

from . import dtypes
from .alu import ACTIVATIONS, OPS
from .dma import dma_copy
from .errors import refuse
from .machine import current, tile
from .memory import PSUM, SBUF
from .scalar_engine import activation_
from .tensor import Tensor
from .tensor_engine import nc_matmul, nc_transpose
from .vector_engine import reciprocal, tensor_copy, tensor_reduce, tensor_scalar, tensor_tensor


def new(shape, dtype, buffer=SBUF) -> Tensor:
    return current().allocate(shape, dtype, buffer)


def elementwise(op, x, y=None, dtype=None) -> Tensor:
    """nl.add(x, y) and the like: y a tile, or a number."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        out = new(x.shape, dtype or x.dtype)
        if y.free == 1 and x.free != 1:
            tensor_scalar(out, x, op, y)
        else:
            tensor_tensor(out, x, y, op)
        return out
    if isinstance(x, Tensor):
        out = new(x.shape, dtype or x.dtype)
        tensor_scalar(out, x, op, y)
        return out
    out = new(y.shape, dtype or y.dtype)
    tensor_scalar(out, y, op, x, reverse0=True)
    return out


def activated(function, x, bias=None, scale=1.0, dtype=None) -> Tensor:
    out = new(x.shape, dtype or x.dtype)
    activation_(out, function, x, bias, scale)
    return out


def load(src, dtype=None) -> Tensor:
    out = new(src.shape if src.ndim > 1 else (1, *src.shape), dtype or src.dtype)
    dma_copy(out, src)
    return out


def store_to(dst, value) -> None:
    dma_copy(dst, value)


def copy(x, dtype=None) -> Tensor:
    out = new(x.shape, dtype or x.dtype)
    tensor_copy(out, x)
    return out


def _reduction(op):
    def reduce(x, axis, dtype=None, keepdims=False):
        axes = sorted(a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis))
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        if not keepdims:
            shape = [n for i, n in enumerate(x.shape) if i not in axes] or [1]
            shape = shape if len(shape) > 1 else [*shape, 1]
        out = new(shape, dtype or x.dtype)
        tensor_reduce(out, op, x, axis)
        return out

    return reduce


def mean(x, axis, dtype=None, keepdims=False) -> Tensor:
    total = _reduction(OPS["add"])(x, axis, dtypes.float32, keepdims)
    out = new(total.shape, dtype or x.dtype)
    tensor_scalar(out, total, OPS["multiply"], total.size / x.size)
    return out


def softmax(x, axis=-1, dtype=None) -> Tensor:
    if axis % x.ndim != x.ndim - 1:
        refuse(f"nl.softmax is over the last axis, got {axis}")
    top, total, over = (new((x.shape[0], 1), dtypes.float32) for _ in range(3))
    powers, out = new(x.shape, dtypes.float32), new(x.shape, dtype or x.dtype)
    tensor_reduce(top, OPS["maximum"], x, axis, negate=True)
    activation_(powers, ACTIVATIONS["exp"], x, top, reduce_op=OPS["add"], reduce_res=total)
    reciprocal(over, total)
    tensor_scalar(out, powers, OPS["multiply"], over)
    return out


def matmul(x, y, transpose_x=False) -> Tensor:
    if not transpose_x:
        flipped = new((x.free, x.shape[0]), x.dtype, PSUM)
        nc_transpose(flipped, x)
        x = copy(flipped)
    out = new((x.free, y.free), dtypes.float32, PSUM)
    nc_matmul(out, x, y)
    return out


def transpose(x) -> Tensor:
    out = new((x.free, x.shape[0]), x.dtype, PSUM)
    nc_transpose(out, x)
    return out


def where(condition, x, y, dtype=None) -> Tensor:
    one = new(x.shape, dtypes.float32)
    tensor_scalar(one, condition, OPS["not_equal"], 0)
    kept, other = elementwise(OPS["multiply"], x, one), elementwise(OPS["multiply"], y, one)
    rest = elementwise(OPS["subtract"], y, other)
    return elementwise(OPS["add"], kept, rest, dtype)


def broadcast_to(x, shape) -> Tensor:
    for dim, size in enumerate(shape):
        if x.shape[dim] != size:
            x = x.broadcast(dim, size)
    return x


def filled(value: float):
    def make(shape, dtype, buffer=SBUF, name=""):
        from .vector_engine import memset

        out = new(shape, dtype, buffer)
        if out.on_chip:
            memset(out, int(value) if out.dtype.kind == "int" else float(value))
            return out
        rows = out.reshape((-1, shape[-1]))
        for start in range(0, rows.shape[0], 128):
            part = rows[start : min(start + 128, rows.shape[0])]
            block = new(part.shape, dtype)
            memset(block, int(value) if out.dtype.kind == "int" else float(value))
            dma_copy(part, block)
        return out

    return make


def full(shape, fill_value, dtype, buffer=SBUF, name="") -> Tensor:
    return filled(fill_value)(shape, dtype, buffer)


def zeros_like(x, dtype=None, buffer=SBUF, name="") -> Tensor:
    return filled(0.0)(x.shape, dtype or x.dtype, buffer)


def empty_like(x, dtype=None, buffer=SBUF, name="") -> Tensor:
    return new(x.shape, dtype or x.dtype, buffer)


def shared_identity_matrix(n: int, dtype=dtypes.uint8, dst=None) -> Tensor:
    """An identity of n x n in SBUF, one for all who ask."""
    machine, dtype = current(), dtypes.resolve(dtype)
    if dst is None:
        key = (n, dtype)
        if key not in machine.identities:
            machine.identities[key] = machine.allocate((n, n), dtype, SBUF, "identity")
        dst = machine.identities[key]
    tile("shared_identity_matrix", "dst", dst, buffers=(SBUF,))
    if not machine.dry:
        from .machine import store

        values = np.eye(n, dtype=np.float32)
        store(dst, values.astype(dst.dtype.store), bits=True)
    return dst


def shared_constant(value, dtype=None) -> Tensor:
    """An array in HBM, known when the kernel is compiled."""
    from .memory import HBM, Storage

    array = np.ascontiguousarray(np.load(value) if isinstance(value, str) else value)
    held = dtypes.of(array) if dtype is None else dtypes.resolve(dtype)
    return Tensor.whole(Storage(array.shape, held, HBM, "constant",
                                array=array.astype(held.store)))  # fmt: skip


def reduction_functions() -> dict:
    names = {"sum": "add", "max": "maximum", "min": "minimum", "prod": "multiply"}
    return {name: _reduction(OPS[op]) for name, op in names.items()}
