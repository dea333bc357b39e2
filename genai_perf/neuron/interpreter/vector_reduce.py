"""Vector instructions that also reduce, in the engine's accumulator registers."""

import numpy as np

from . import dtypes
from .alu import OPS, Op, operator, reducer
from .enums import reduce_cmd as commands
from .errors import refuse, require
from .machine import (
    HANDLE,
    check_tiles,
    current,
    from_generation,
    not_both_psum,
    operand,
    raw,
    read,
    store,
    tile,
)
from .vector_engine import apply, check_op

FP32_MIN = -3.4028234663852886e38


def accumulate(machine, key: str, command, value: np.ndarray, op: Op, initial=None) -> np.ndarray:
    """The engine's accumulator registers after `command`; `value` is this instruction's part."""
    old = machine.registers.get(key)
    if command is commands.load_reduce:
        old = np.broadcast_to(np.asarray(initial, np.float32), value.shape)
    elif command is commands.reduce:
        if old is None or old.shape != value.shape:
            refuse(
                "reduce_cmd.reduce continues a sum that no instruction started on these partitions"
            )
    elif command in (commands.reset_reduce, commands.reset):
        old = None
    new = value if old is None else op.run(old, value)
    machine.registers[key] = new.astype(np.float32)
    return machine.registers[key]


def _reduce_into(machine, key, what, command, res, values, op, initial=None, negate=False) -> None:
    if command is commands.idle:
        machine.registers.pop(key, None)
        return
    total = accumulate(machine, key, command, op.reduce(values), op, initial)
    if res is not None:
        store(res, (-total if negate else total)[:, None])


def _check_res(what: str, res, dst) -> None:
    if res is None:
        return
    tile(what, "reduce_res", res)
    if res.shape[0] != dst.shape[0] or res.free != 1:
        refuse(f"{what}: reduce_res must be ({dst.shape[0]}, 1), got {res.shape}")


def tensor_scalar_reduce(
    dst,
    data,
    op0,
    operand0,
    reduce_op,
    reduce_res=None,
    reverse0=False,
    reduce_cmd=commands.reset_reduce,
    reduce_init=None,
    reduce_res_negate=False,
    name=None,
):
    """dst = data op0 operand0, and its reduction over each row."""
    what, machine = "tensor_scalar_reduce", current()
    check_tiles(what, dst, data=data)
    _check_res(what, reduce_res, dst)
    op0 = check_op(what, machine, operator(what, "op0", op0))
    reduce_op = check_op(what, machine, reducer(what, "reduce_op", reduce_op))
    require(
        reduce_op.name in ("add", "multiply", "maximum", "minimum"),
        f"{what}: reduce_op must be add, multiply, maximum or minimum",
    )
    require(not reverse0, f"{what}: reverse0 is not supported by the hardware's own tools")
    other = (
        None if op0.kind == "unary" else operand(what, "operand0", operand0, machine, dst.shape[0])
    )
    machine.issue("vector", what, dst.free + 64)
    if machine.dry:
        return HANDLE
    values = apply(what, op0, read(data), other, False).astype(np.float32)
    store(dst, values)
    _reduce_into(
        machine,
        "vector",
        what,
        reduce_cmd,
        reduce_res,
        values,
        reduce_op,
        reduce_init,
        reduce_res_negate,
    )
    return HANDLE


def range_select(
    dst,
    on_true_tile,
    comp_op0,
    comp_op1,
    bound0,
    bound1,
    reduce_cmd=commands.reset_reduce,
    reduce_res=None,
    reduce_op=None,
    range_start=0,
    on_false_value=FP32_MIN,
    name=None,
):
    """Keep element f where comp_op0(range_start + f, bound0) and comp_op1(.., bound1); row max."""
    what, machine = "range_select", current()
    from_generation(machine, 3, what)
    check_tiles(what, dst, on_true_tile=on_true_tile)
    _check_res(what, reduce_res, dst)
    if reduce_op is not None:
        require(
            reducer(what, "reduce_op", reduce_op).name == "maximum",
            f"{what}: reduces by maximum only",
        )
    require(
        np.float32(on_false_value) == np.float32(FP32_MIN),
        f"{what}: on_false_value must be {FP32_MIN}",
    )
    require(
        isinstance(range_start, int) and range_start + dst.free < 2**24,
        f"{what}: range_start must be a constant below 2^24",
    )
    ops = [operator(what, "comp_op", op) for op in (comp_op0, comp_op1)]
    bounds = [operand(what, "bound", b, machine, dst.shape[0]) for b in (bound0, bound1)]
    machine.issue("vector", what, dst.free)
    if machine.dry:
        return HANDLE
    at = np.arange(range_start, range_start + dst.free, dtype=np.float32)[None]
    keep = (ops[0].run(at, bounds[0]) != 0) & (ops[1].run(at, bounds[1]) != 0)
    values = np.where(keep, read(on_true_tile), np.float32(FP32_MIN))
    store(dst, values)
    _reduce_into(machine, "vector", what, reduce_cmd, reduce_res, values, OPS["maximum"])
    return HANDLE


def select_reduce(
    dst,
    predicate,
    on_true,
    on_false,
    reduce_res=None,
    reduce_cmd=commands.idle,
    reduce_op=None,
    reverse_pred=False,
    name=None,
):
    """Where predicate is not 0 on_true, else on_false; row maximum."""
    what, machine = "select_reduce", current()
    for n, x in (("dst", dst), ("predicate", predicate), ("on_true", on_true)):
        tile(what, n, x)
    if not dst.shape == predicate.shape == on_true.shape:
        refuse(
            f"{what}: dst {dst.shape}, predicate {predicate.shape} and on_true "
            f"{on_true.shape} must be of one shape"
        )
    require(
        predicate.dtype.name in ("int8", "uint8", "int16", "uint16", "bool_"),
        f"{what}: predicate must be of 8 or 16 bit integers, got {predicate.dtype}",
    )
    require(on_true.dtype not in (dtypes.int32, dtypes.tfloat32), f"{what}: on_true type")
    _check_res(what, reduce_res, dst)
    not_both_psum(what, predicate, on_true)
    other = operand(what, "on_false", on_false, machine, dst.shape[0])
    machine.issue("vector", what, 2 * dst.free)
    if machine.dry:
        return HANDLE
    keep = (raw(predicate) != 0) ^ bool(reverse_pred)
    values = np.where(keep, read(on_true), other).astype(np.float32)
    store(dst, values)
    _reduce_into(machine, "vector", what, reduce_cmd, reduce_res, values, OPS["maximum"])
    return HANDLE


def tensor_scalar_cumulative(
    dst, src, op0, op1, imm0, imm1=None, reduce_cmd=commands.reset_reduce, name=None
):
    """Running reduction by op1 of src op0 imm0."""
    what, machine = "tensor_scalar_cumulative", current()
    check_tiles(what, dst, src=src)
    op0, op1 = (check_op(what, machine, operator(what, "op", op)) for op in (op0, op1))
    other = operand(what, "imm0", imm0, machine, dst.shape[0])
    first = None if imm1 is None else operand(what, "imm1", imm1, machine, dst.shape[0])
    machine.issue("vector", what, 2 * dst.free)
    if machine.dry:
        return HANDLE
    values = apply(what, op0, read(src), other, False)
    state = (
        machine.registers.get("vector")
        if reduce_cmd is commands.reduce
        else (
            None if first is None else np.broadcast_to(np.float32(first), (dst.shape[0], 1))[:, 0]
        )
    )
    result = np.empty(values.shape, np.float32)
    for i in range(values.shape[1]):
        state = values[:, i] if state is None else op1.run(state, values[:, i])
        result[:, i] = state
    machine.registers["vector"] = result[:, -1]
    store(dst, result)
    return HANDLE
