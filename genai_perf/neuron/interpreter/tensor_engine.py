"""Instructions of the tensor engine: nc_matmul and nc_transpose."""

import numpy as np

from . import dtypes
from .enums import engine as engines
from .enums import matmul_perf_mode
from .errors import refuse, require
from .machine import (
    HANDLE,
    current,
    from_generation,
    moved,
    read,
    store,
    tile,
)
from .memory import PSUM, SBUF
from .targets import PARTITIONS
from .tensor import Tensor

_FULL = (dtypes.float32, dtypes.tfloat32)
_OPERANDS = (*_FULL, dtypes.bfloat16, dtypes.float16, *dtypes.FP8)
MOVING_LIMIT = 512


def nc_matmul(dst, stationary, moving, is_stationary_onezero=False, is_moving_onezero=False,
              is_transpose=False, accumulate=None, tile_position=(), tile_size=(),
              perf_mode=matmul_perf_mode.none, name=None):  # fmt: skip
    """dst[M, N] (+)= stationary[K, M]^T moving[K, N], contraction over partitions."""
    what, machine = "nc_matmul", current()
    tile(what, "dst", dst, buffers=(PSUM,))
    tile(what, "stationary", stationary, buffers=(SBUF,))
    tile(what, "moving", moving, buffers=(SBUF,))
    _check_types(machine, stationary, moving)
    double = perf_mode is not matmul_perf_mode.none
    if double:
        _check_double_row(machine, stationary, moving, is_transpose, perf_mode)
    rows, pairs = stationary.shape[0], 2 if double else 1
    columns, free = stationary.free // pairs, moving.free // pairs
    if moving.shape[0] != rows:
        refuse(f"{what}: stationary {stationary.shape} and moving {moving.shape} must have the "
               "same partitions")  # fmt: skip
    require(columns <= PARTITIONS, f"{what}: stationary has {columns} columns, the limit is 128")
    wide = 2 if machine.target.generation >= 4 and dst.itemsize == 2 else 1
    require(free <= MOVING_LIMIT * wide,
            f"{what}: moving has {free} columns, the limit is {MOVING_LIMIT * wide}")  # fmt: skip
    if dst.shape[0] != columns or dst.free != free:
        refuse(f"{what}: dst {dst.shape} must be ({columns}, {free})")
    _check_tiling(machine, rows, columns, tile_position, tile_size, double)
    _check_result(machine, dst, stationary, is_transpose)
    slow = 4 if moving.dtype is dtypes.float32 and not (
        is_stationary_onezero or is_moving_onezero
    ) else 2 if moving.dtype is dtypes.float32 else 1  # fmt: skip
    machine.issue("tensor", "transpose" if is_transpose else what,
                  slow * max(min(64, columns), free))  # fmt: skip
    if not is_transpose:
        flops = 2 * rows * pairs * columns * free
        machine.meter.flops += flops
        machine.meter.fp8_flops += flops if double else 0
    if machine.dry:
        return HANDLE
    if is_transpose:
        _transpose(machine, dst, stationary, moving)
    else:
        _multiply(dst, stationary, moving, pairs, accumulate)
    return HANDLE


def _check_types(machine, stationary: Tensor, moving: Tensor) -> None:
    for name, x in (("stationary", stationary), ("moving", moving)):
        if x.dtype not in _OPERANDS:
            refuse(f"nc_matmul: {name} must be of a float type, got {x!r}; integers up to 256 are "
                   "exact in bfloat16")  # fmt: skip
        if x.dtype is dtypes.float8_e4m3fn:
            from_generation(machine, 4, "nc_matmul on float8_e4m3fn")
    pair = {stationary.dtype, moving.dtype}
    if any(d in _FULL for d in pair) and not all(d in _FULL for d in pair):
        refuse(f"nc_matmul: float32 goes with float32 only, got {stationary.dtype} and "
               f"{moving.dtype}")  # fmt: skip
    if {dtypes.float8_e4m3, dtypes.float8_e4m3fn} <= pair:
        refuse("nc_matmul: float8_e4m3 and float8_e4m3fn cannot be mixed")


def _check_double_row(machine, stationary, moving, is_transpose, perf_mode) -> None:
    from_generation(machine, 3, "nc_matmul with double_row")
    if perf_mode is not matmul_perf_mode.double_row:
        refuse(f"nc_matmul: perf_mode must be none or double_row here, got {perf_mode!r}")
    for name, x in (("stationary", stationary), ("moving", moving)):
        if x.dtype not in dtypes.FP8:
            refuse(f"nc_matmul: double_row takes fp8, {name} is {x.dtype}")
        if x.ndim < 3 or x.shape[1] != 2:
            refuse(f"nc_matmul: double_row takes {name} as (K, 2, n), got {x.shape}")
    require(not is_transpose, "nc_matmul: double_row does not transpose")


def _check_tiling(machine, rows, columns, position, size, double) -> None:
    if not position and not size:
        return
    if len(position) != 2 or len(size) != 2:
        refuse("nc_matmul: tile_position and tile_size are given together, as pairs")
    for at, extent in zip(position, size, strict=True):
        if extent not in (32, 64, 128) or (extent == 32 and machine.target.generation < 3):
            refuse(f"nc_matmul: tile_size must be of 32 (gen3), 64 or 128, got {tuple(size)}")
        if at % extent or at + extent > PARTITIONS:
            refuse(f"nc_matmul: tile_position {tuple(position)} is no multiple of tile_size "
                   f"{tuple(size)} inside 128")  # fmt: skip
    if rows > size[0] or columns > size[1]:
        refuse(f"nc_matmul: a stationary of {(rows, columns)} does not fit tile_size {tuple(size)}")
    require(not (double and size[1] != PARTITIONS),
            "nc_matmul: double_row does not go with column tiling")  # fmt: skip


def _check_result(machine, dst: Tensor, stationary: Tensor, is_transpose: bool) -> None:
    allowed = (dtypes.float32,)
    if machine.target.generation >= 4:
        allowed = (dtypes.float32, dtypes.bfloat16)
    if is_transpose:
        allowed = (stationary.dtype, dtypes.float32)
    if dst.dtype not in allowed:
        refuse(f"nc_matmul: dst must be {' or '.join(map(str, allowed))} on "
               f"{machine.target.name}, got {dst!r}")  # fmt: skip
    _check_bank("nc_matmul", machine, dst)


def _check_bank(what: str, machine, dst: Tensor) -> None:
    """One instruction of the tensor engine writes inside one PSUM bank."""
    row = dst.storage.free_size * dst.storage.dtype.itemsize
    start = dst.storage.bank_offset + dst._byte_offset() % row
    reach = sum((n - 1) * s for n, s in zip(dst.shape[1:], dst.data.strides[1:], strict=True))
    bank = machine.target.bank_bytes
    if start // bank != (start + reach + dst.itemsize - 1) // bank:
        refuse(f"{what}: dst {dst!r} lies on more than one PSUM bank of {bank} bytes")


def _product(stationary: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Summed in float64 and rounded to fp32 once an instruction: the same bits on every machine.
    The hardware adds in fp32, in an order that is not documented."""
    import torch

    left, right = (torch.from_numpy(x.astype(np.float64)) for x in (stationary, moving))
    return (left.T @ right).numpy().astype(np.float32)


def _rows(x: Tensor, pairs: int) -> np.ndarray:
    """What is summed over comes first: partitions, and the pairs of double_row."""
    values = read(x).reshape(x.shape[0] * pairs, -1)
    return dtypes.round_tf32(values) if x.dtype is dtypes.tfloat32 else values


def _transpose(machine, dst, stationary, moving) -> None:
    """moving is an identity; gen3 and later move the bits, gen2 multiplies whatever is there."""
    other = _rows(moving, 1)
    if machine.target.generation < 3:
        store(dst, _product(_rows(stationary, 1), other))
        return
    values, written = moved(stationary, dst)
    if written is not None:
        written = _product(~written, other != 0) == 0
    store(dst, _product(values, other), written=written)


def _multiply(dst, stationary, moving, pairs, accumulate) -> None:
    result = _product(_rows(stationary, pairs), _rows(moving, pairs))
    full = np.iinfo(dst.summed.dtype).max
    if accumulate is None:
        old = (dst.summed == full).reshape(result.shape)
        if old.any():
            result = np.where(old, dtypes.to_float(dst.rows(), dst.dtype) + result, result)
    elif accumulate:
        if (dst.summed != full).any():
            refuse("nc_matmul: accumulate=True adds to what a matmul wrote before, and "
                   f"{dst!r} was not (all) written by one")  # fmt: skip
        result = result + dtypes.to_float(dst.rows(), dst.dtype)
    store(dst, result, summed=True)


def nc_transpose(dst, data, engine=engines.unknown, name=None):
    """dst[F, P] = data[P, F], bit for bit: 128x128 on the tensor engine, 32x32 on Vector."""
    what, machine = "nc_transpose", current()
    tile(what, "dst", dst)
    tile(what, "data", data)
    rows, columns = data.shape[0], data.free
    if engine is engines.unknown:
        engine = engines.tensor if dst.in_psum() and not data.in_psum() else engines.vector
    if dst.dtype is not data.dtype:
        refuse(f"{what}: dst must have the type of data ({data.dtype}), got {dst.dtype}")
    if dst.shape[0] != columns or dst.free != rows:
        refuse(f"{what}: dst {dst.shape} must be ({columns}, {rows})")
    if engine is engines.tensor:
        require(dst.in_psum() and not data.in_psum(),
                f"{what}: the tensor engine reads SBUF and writes PSUM")  # fmt: skip
        require(columns <= PARTITIONS, f"{what}: data has {columns} columns, the limit is 128")
        require(data.dtype.kind == "float" or machine.target.generation >= 3,
                f"{what}: the tensor engine of {machine.target.name} takes floats")  # fmt: skip
        _check_bank(what, machine, dst)
        slow = 4 if data.dtype.itemsize == 4 else 1
        machine.issue("tensor", "transpose", slow * max(rows, min(64, columns)))
    elif engine is engines.vector:
        require(max(rows, columns) <= 32, f"{what}: Vector transposes up to 32x32, got "
                f"{(rows, columns)}")  # fmt: skip
        machine.issue("vector", what, columns)
    else:
        refuse(f"{what}: engine must be tensor or vector, got {engine!r}")
    if not machine.dry:
        values, written = moved(data, dst, bits=True)
        store(dst, values.T, bits=True, written=None if written is None else written.T)
    return HANDLE
