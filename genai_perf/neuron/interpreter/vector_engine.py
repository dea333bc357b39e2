"""Elementwise instructions of the Vector engine; some also run on GpSimd or Scalar."""

import numpy as np

from . import dtypes
from .alu import Op, operator, reducer
from .enums import engine as engines
from .errors import refuse, require
from .machine import (
    HANDLE,
    check_tiles,
    check_written,
    current,
    from_generation,
    mark,
    moved,
    no_psum,
    not_both_psum,
    operand,
    raw,
    read,
    same_shape,
    store,
    tile,
)
from .memory import SBUF
from .tensor import Tensor

_INT32 = (dtypes.int32, dtypes.uint32)


def fast(machine, dst: Tensor, *sources: Tensor, two_inputs: bool = False) -> float:
    """By how much gen3 and later speed up 16-bit operands."""
    tiles = (dst, *sources)
    if machine.target.generation < 3 or any(t.itemsize != 2 for t in tiles):
        return 1
    if two_inputs:
        return 1 if any(s.in_psum() for s in sources) else 2
    if any(t.in_psum() for t in tiles) or any(t.strides[-1] not in (0, 1) for t in tiles):
        return 2
    return 4


def _two_input_cycles(machine, dst, first, second, engine) -> float:
    if engine is engines.gpsimd:
        return 2 * dst.free
    speed = fast(machine, dst, first, second, two_inputs=True)
    if speed > 1:
        return dst.free / speed
    sixteen = all(t.itemsize == 2 for t in (dst, first, second))
    return dst.free if sixteen or first.in_psum() or second.in_psum() else 2 * dst.free


def check_op(what: str, machine, op: Op) -> Op:
    from_generation(machine, op.since, f"{what} with {op!r}")
    return op


def _check_bits(what: str, *tiles: Tensor) -> None:
    for t in tiles:
        require(t.dtype.kind == "int", f"{what}: a bit operation takes integers, got {t!r}")


def tensor_tensor(dst, data1, data2, op, engine=engines.unknown, name=None):
    """dst = data1 op data2."""
    what, machine = "tensor_tensor", current()
    check_tiles(what, dst, data1=data1, data2=data2)
    op = check_op(what, machine, operator(what, "op", op))
    require(op.kind != "unary", f"{what}: op must take two operands, got {op!r}")
    not_both_psum(what, data1, data2)
    tiles = (dst, data1, data2)
    exact = any(t.dtype in _INT32 for t in tiles) and not any(t.in_psum() for t in tiles)
    if engine is engines.unknown:
        engine = (
            engines.gpsimd
            if op.name == "power" or (exact and op.kind == "arithmetic")
            else engines.vector
        )
    if engine not in (engines.vector, engines.gpsimd):
        refuse(f"{what}: engine must be vector or gpsimd, got {engine!r}")
    if engine is engines.gpsimd:
        no_psum(what, "GpSimd", *tiles)
        require(op.kind != "bits", f"{what}: bit operations run on Vector")
    require(op.name != "power" or engine is engines.gpsimd, f"{what}: power runs on GpSimd")
    machine.issue(
        "gpsimd" if engine is engines.gpsimd else "vector",
        what,
        _two_input_cycles(machine, dst, data1, data2, engine),
    )
    if machine.dry:
        return HANDLE
    if op.kind == "bits":
        _check_bits(what, *tiles)
        store(dst, op.run(raw(data1), raw(data2)).astype(dst.dtype.store), bits=True)
    elif exact and engine is engines.gpsimd and all(t.dtype.kind == "int" for t in tiles):
        values = op.run(raw(data1).astype(np.int64), raw(data2).astype(np.int64))
        store(dst, np.asarray(values).astype(dst.dtype.store), bits=True)
    else:
        store(dst, op.run(read(data1), read(data2)))
    return HANDLE


def apply(what, op: Op, value, other, reverse: bool):
    if op.kind == "unary":
        return op.run(value, None)
    return op.run(other, value) if reverse else op.run(value, other)


def _scalar_engine_ops(op0: Op, op1: Op | None) -> bool:
    names = (op0.name, None if op1 is None else op1.name)
    return names in (("multiply", "add"), ("multiply", None), ("add", None))


def tensor_scalar(
    dst,
    data,
    op0,
    operand0=None,
    reverse0=False,
    op1=None,
    operand1=None,
    reverse1=False,
    engine=engines.unknown,
    name=None,
):
    """dst = (data op0 operand0) op1 operand1, the operands numbers or (P, 1)."""
    what, machine = "tensor_scalar", current()
    check_tiles(what, dst, data=data)
    op0 = check_op(what, machine, operator(what, "op0", op0))
    op1 = None if op1 is None else check_op(what, machine, operator(what, "op1", op1))
    bits = op0.kind == "bits"
    if op1 is not None and (op1.kind == "bits") != bits:
        refuse(f"{what}: op0 and op1 must both be arithmetic or both bit operations")
    steps = [(op0, operand0, reverse0), (op1, operand1, reverse1)]
    values = []
    for n, (op, x, _) in enumerate(steps):
        if op is None:
            continue
        unary = op.kind == "unary" or op.name == "invert"
        require(unary or x is not None, f"{what}: {op!r} needs operand{n}")
        values.append(
            None if unary else operand(what, f"operand{n}", x, machine, dst.shape[0], bits=bits)
        )
    engine = _choose_scalar_engine(what, machine, engine, op0, op1, dst, data)
    cycles = dst.free / (fast(machine, dst, data) if engine is engines.vector else 1)
    machine.issue(engine.name.split(".")[1], what, cycles)
    if bits:
        _check_bits(what, dst, data)
    if machine.dry:
        return HANDLE
    value = raw(data) if bits else read(data)
    for (op, _, reverse), other in zip(steps, values, strict=False):
        value = apply(what, op, value, other, reverse)
    store(dst, value.astype(dst.dtype.store) if bits else value.astype(np.float32), bits=bits)
    return HANDLE


def _choose_scalar_engine(what, machine, engine, op0, op1, dst, data):
    if engine is engines.unknown:
        return engines.vector
    if engine is engines.scalar:
        from_generation(machine, 3, f"{what} on the Scalar engine")
        require(
            _scalar_engine_ops(op0, op1),
            f"{what}: the Scalar engine does multiply, add, or multiply then add",
        )
    elif engine is engines.gpsimd:
        require(op0.name == "rsqrt", f"{what}: GpSimd does rsqrt only, got {op0!r}")
        no_psum(what, "GpSimd", dst, data)
    elif engine is not engines.vector:
        refuse(f"{what}: engine must be vector, scalar or gpsimd, got {engine!r}")
    return engine


def scalar_tensor_tensor(
    dst, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False, name=None
):
    """dst = (data op0 operand0) op1 operand1, operand0 a number or (P, 1), operand1 a tile."""
    what, machine = "scalar_tensor_tensor", current()
    check_tiles(what, dst, data=data, operand1=operand1)
    op0, op1 = (check_op(what, machine, operator(what, "op", op)) for op in (op0, op1))
    require("bits" not in (op0.kind, op1.kind), f"{what}: arithmetic only")
    scalar = operand(what, "operand0", operand0, machine, dst.shape[0])
    not_both_psum(what, data, operand1)
    machine.issue("vector", what, _two_input_cycles(machine, dst, data, operand1, engines.vector))
    if not machine.dry:
        value = apply(what, op0, read(data), scalar, reverse0)
        store(dst, apply(what, op1, value, read(operand1), reverse1))
    return HANDLE


def tensor_copy(dst, src, engine=engines.unknown, name=None, dtype=None):
    """dst = src, cast on the way; dtype: of NKI 0.2, dst's own."""
    what, machine = "tensor_copy", current()
    tile(what, "dst", dst)
    require(dtype in (None, dst.dtype), f"{what}: dtype must be that of dst {dst!r}, got {dtype}")
    tile(what, "src", src)
    same_shape(what, dst, src=src)
    engine = engines.vector if engine is engines.unknown else engine
    if engine is engines.scalar:
        from_generation(machine, 3, f"{what} on the Scalar engine")
    elif engine is engines.gpsimd:
        no_psum(what, "GpSimd", dst, src)
    elif engine is not engines.vector:
        refuse(f"{what}: engine must be vector, scalar or gpsimd, got {engine!r}")
    speed = fast(machine, dst, src) if engine is engines.vector else 1
    machine.issue(engine.name.split(".")[1], what, dst.free / speed)
    if machine.dry:
        return HANDLE
    bits = dst.dtype is src.dtype
    values, written = moved(src, dst, bits=bits)
    store(dst, values, bits=bits, written=written)
    return HANDLE


def memset(dst, value, engine=engines.unknown, name=None):
    """dst = value, a literal of dst's kind."""
    what, machine = "memset", current()
    tile(what, "dst", dst)
    engine = engines.vector if engine is engines.unknown else engine
    if engine is engines.gpsimd:
        no_psum(what, "GpSimd", dst)
    elif engine is not engines.vector:
        refuse(f"{what}: engine must be vector or gpsimd, got {engine!r}")
    if dst.dtype.kind == "int":
        require(isinstance(value, int), f"{what}: {dst.dtype} takes an int, got {value!r}")
        info = np.iinfo(dst.dtype.store)
        require(info.min <= value <= info.max, f"{what}: {value} does not fit {dst.dtype}")
    else:
        require(
            value == 0 or (isinstance(value, float) and dst.dtype.kind == "float"),
            f"{what}: {dst.dtype} takes {'0' if dst.dtype.kind == 'packed' else 'a float'}, got "
            f"{value!r}",
        )
    machine.issue(engine.name.split(".")[1], what, dst.free / fast(machine, dst))
    if not machine.dry:
        values = np.array(value, np.float64 if dst.dtype.kind == "float" else dst.dtype.store)
        if dst.dtype.kind == "float":
            values = dtypes.from_float(values.astype(np.float32)[None], dst.dtype)[0]
        dst.data[...] = values
        mark(dst)
    return HANDLE


def tensor_reduce(dst, op, data, axis, negate=False, keepdims=False, name=None):
    """dst = data reduced over its last free dimensions."""
    what, machine = "tensor_reduce", current()
    tile(what, "dst", dst)
    tile(what, "data", data)
    op = check_op(what, machine, reducer(what, "op", op))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(sorted(a % data.ndim for a in axes))
    if axes != tuple(range(data.ndim - len(axes), data.ndim)) or 0 in axes:
        refuse(f"{what}: axis must be the last free dimensions of {data.shape}, got {axis}")
    kept = int(np.prod(data.shape[1 : axes[0]], dtype=np.int64))
    if dst.shape[0] != data.shape[0] or dst.free != kept:
        refuse(f"{what}: dst {dst.shape} must hold ({data.shape[0]}, {kept}) elements")
    half = (
        data.dtype is dtypes.bfloat16
        and op.name in ("add", "maximum", "minimum")
        and (machine.target.generation >= 3)
    )
    machine.issue("vector", what, data.free / (2 if half else 1))
    if machine.dry:
        return HANDLE
    if op.kind == "bits":
        _check_bits(what, dst, data)
        store(dst, op.reduce(raw(data).reshape(data.shape[0], kept, -1)), bits=True)
        return HANDLE
    values = op.reduce(read(data).reshape(data.shape[0], kept, -1))
    store(dst, -values if negate else values)
    return HANDLE


def tensor_tensor_scan(
    dst, data0, data1, initial, op0, op1, reverse0=False, reverse1=False, name=None
):
    """r[i] = (data0[i] op0 r[i - 1]) op1 data1[i], r[-1] = initial."""
    what, machine = "tensor_tensor_scan", current()
    check_tiles(what, dst, data0=data0, data1=data1)
    op0, op1 = (check_op(what, machine, operator(what, "op", op)) for op in (op0, op1))
    start = operand(what, "initial", initial, machine, dst.shape[0])
    not_both_psum(what, data0, data1)
    machine.issue("vector", what, 2 * dst.free)
    if machine.dry:
        return HANDLE
    first, second = read(data0), read(data1)
    state = np.broadcast_to(np.asarray(start, np.float32), (dst.shape[0], 1))[:, 0]
    result = np.empty(first.shape, np.float32)
    for i in range(first.shape[1]):
        state = apply(what, op0, first[:, i], state, reverse0)
        state = apply(what, op1, state, second[:, i], reverse1).astype(np.float32)
        result[:, i] = state
    store(dst, result)
    return HANDLE


def tensor_copy_predicated(dst, src, predicate, reverse_pred=False, name=None):
    """dst = src where predicate is not 0; elsewhere dst stays."""
    what, machine = "tensor_copy_predicated", current()
    check_tiles(what, dst, predicate=predicate)
    require(
        predicate.dtype.name in ("uint8", "uint16", "uint32", "bool_"),
        f"{what}: predicate must be of unsigned integers, got {predicate.dtype}",
    )
    if isinstance(src, Tensor):
        tile(what, "src", src)
        same_shape(what, dst, src=src)
        require(src.dtype is dst.dtype, f"{what}: src and dst must be of one type")
        not_both_psum(what, src, predicate)
    machine.issue("vector", what, 2 * dst.free)
    if machine.dry:
        return HANDLE
    keep = (raw(predicate) != 0) ^ bool(reverse_pred)
    if isinstance(src, Tensor):
        values = raw(src)
    else:
        values = dtypes.from_float(np.array([[src]], np.float32), dst.dtype)
    if not keep.all():
        check_written(dst)
    store(dst, np.where(keep, values, dst.rows()), bits=True)
    return HANDLE


def reciprocal(dst, data, name=None):
    """dst = 1 / data, precise: 8 cycles an element."""
    what, machine = "reciprocal", current()
    check_tiles(what, dst, data=data)
    machine.issue("vector", what, 8 * dst.free)
    if not machine.dry:
        store(dst, (1 / read(data)).astype(np.float32))
    return HANDLE


def check_sbuf(what: str, **tiles) -> None:
    for name, x in tiles.items():
        tile(what, name, x, buffers=(SBUF,))
