"""Instructions of the Scalar engine: a function of data * scale + bias, with a row sum."""

import numpy as np

from . import dtypes
from .alu import OPS, activation, reducer
from .enums import reduce_cmd as commands
from .errors import refuse, require
from .machine import (
    HANDLE,
    check_tiles,
    current,
    from_generation,
    operand,
    read,
    store,
    tile,
)
from .tensor import Tensor
from .vector_reduce import accumulate


def _bias(what: str, machine, bias, dst):
    if bias is None:
        return np.float32(0)
    if not isinstance(bias, Tensor):
        require(isinstance(bias, (int, float)), f"{what}: bias must be a number or a tile")
        from_generation(machine, 3, f"{what} with a number as bias")
        return np.float32(bias)
    tile(what, "bias", bias)
    if bias.shape[0] != dst.shape[0] or bias.free != 1:
        refuse(f"{what}: bias must be ({dst.shape[0]}, 1), got {bias.shape}")
    require(bias.dtype is not dtypes.tfloat32, f"{what}: bias must not be tfloat32")
    return None if machine.dry else read(bias)


def activation_(dst, op, data, bias=None, scale=1.0, reduce_op=None, reduce_res=None,
                reduce_cmd=commands.idle, name=None):  # fmt: skip
    """dst = op(data * scale + bias); reduce_op=nl.add sums the rows of the result in fp32."""
    what, machine = "activation", current()
    check_tiles(what, dst, data=data)
    op = activation(what, op)
    shift = _bias(what, machine, bias, dst)
    factor = operand(what, "scale", scale, machine, dst.shape[0])
    if reduce_op is not None:
        require(reducer(what, "reduce_op", reduce_op).name == "add", f"{what}: reduces by nl.add")
        if reduce_cmd is commands.idle and reduce_res is not None:
            reduce_cmd = commands.reset_reduce
    cycles = dst.free + (64 if reduce_res is not None else 0)
    fast = machine.target.generation >= 4 and all(t.itemsize == 2 for t in (dst, data))
    machine.issue("scalar", what, cycles / (2 if fast else 1))
    if reduce_res is not None:
        tile(what, "reduce_res", reduce_res)
        if reduce_res.shape[0] != dst.shape[0] or reduce_res.free != 1:
            refuse(f"{what}: reduce_res must be ({dst.shape[0]}, 1), got {reduce_res.shape}")
    if machine.dry:
        return HANDLE
    values = read(data)
    if not (isinstance(factor, np.float32) and factor == 1):
        values = values * factor
    if bias is not None:
        values = values + shift
    op.check(values)
    values = op.run(values).astype(np.float32, copy=False)
    store(dst, values)
    if reduce_cmd is not commands.idle:
        total = accumulate(machine, "scalar", reduce_cmd, values.sum(-1), OPS["add"])
        if reduce_res is not None:
            store(reduce_res, total[:, None])
    return HANDLE


def activation_reduce(dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None):
    """activation with the sum of this instruction alone."""
    return activation_(dst, op, data, bias, scale, reduce_op, reduce_res, commands.reset_reduce)


def exponential(dst, src, max_value=0.0, reduce_res=None, reduce_cmd=commands.idle,
                reduce_init=0.0, name=None):  # fmt: skip
    """gen4, on Vector: exp(src - max_value), at four times the Scalar engine's rate."""
    what, machine = "exponential", current()
    from_generation(machine, 4, what)
    check_tiles(what, dst, src=src)
    shift = operand(what, "max_value", max_value, machine, dst.shape[0])
    machine.issue("vector", what, dst.free / 4)
    if machine.dry:
        return HANDLE
    values = np.exp(read(src) - shift)
    store(dst, values)
    if reduce_res is not None and reduce_cmd is commands.idle:
        reduce_cmd = commands.reset_reduce
    if reduce_cmd is not commands.idle:
        total = accumulate(machine, "vector", reduce_cmd, values.sum(-1), OPS["add"], reduce_init)
        if reduce_res is not None:
            store(reduce_res, total[:, None])
    return HANDLE
