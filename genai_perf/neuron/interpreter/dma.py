"""DMA: copies between memories, gathers and scatters by index, transposes, sums."""

import math

import numpy as np

from . import dtypes
from .alu import operator
from .enums import dge_mode as dge_modes
from .enums import engine as engines
from .enums import oob_mode as oob_modes
from .errors import refuse, require
from .machine import HANDLE, check_written, current, from_generation, mark, raw, read, tile
from .memory import PSUM, SBUF
from .tensor import Tensor

# A run of contiguous bytes shorter than this costs as much as one of this length.
SHORT_RUN = 512


def check_reach(what: str, name: str, x) -> Tensor:
    if not isinstance(x, Tensor):
        refuse(f"{what}: {name} must be a tensor, got {type(x).__name__}")
    if x.storage.buffer is PSUM:
        refuse(f"{what}: DMA cannot touch PSUM, got {name} {x!r}; copy it to SBUF first")
    if x.storage.buffer is SBUF:
        tile(what, name, x, anywhere=True)
    return x


def _run_bytes(x: Tensor) -> int:
    """Bytes of the longest run that the innermost dimensions make."""
    if x.gather is not None:
        dims = x.gather.pattern[1:]
    else:
        dims = list(zip(x.strides, x.shape, strict=True))[1 if x.on_chip else 0 :]
    run = 1
    for stride, count in reversed(dims):
        if count == 1:
            continue
        if stride != run:
            break
        run *= count
    return run * x.itemsize


def meter(machine, what: str, dst: Tensor, src: Tensor, rate_factor: float = 1.0) -> None:
    moved = max(dst.size * dst.itemsize, src.size * src.itemsize)
    run = max(1, min(_run_bytes(dst), _run_bytes(src)))
    effective = moved / run * max(run, SHORT_RUN)
    hbm = not (dst.on_chip and src.on_chip)
    rate = min(machine.target.dma_rate, machine.target.hbm_rate if hbm else math.inf)
    meter = machine.meter
    meter.instructions["dma", what] += 1
    meter.dma_seconds += effective / (rate * rate_factor)
    meter.moved["read"] += 0 if src.on_chip else src.size * src.itemsize
    meter.moved["written"] += 0 if dst.on_chip else dst.size * dst.itemsize


def dma_copy(dst, src, priority=None, oob_mode=oob_modes.error, dge_mode=dge_modes.unknown,
             engine=engines.unknown, name=None):  # fmt: skip
    """dst = src, cast on the way; one side may be gathered or scattered by index."""
    what, machine = "dma_copy", current()
    check_reach(what, "dst", dst)
    check_reach(what, "src", src)
    if dst.size != src.size:
        refuse(f"{what}: dst {dst.shape} and src {src.shape} must have as many elements")
    if dge_mode is dge_modes.hwdge:
        from_generation(machine, 3, f"{what} with hwdge")
        require(dst.dtype is src.dtype, f"{what}: hwdge does not cast")
    meter(machine, what, dst, src)
    if machine.dry:
        return HANDLE
    if dst.gather is not None and src.gather is not None:
        refuse(f"{what}: one side can be indirect, not both")
    if src.gather is not None:
        _gather(what, dst, src, oob_mode)
    elif dst.gather is not None:
        _scatter(what, dst, src, oob_mode)
    else:
        _move(dst, _values(src, dst).reshape(dst.shape))
    return HANDLE


def _values(src: Tensor, dst: Tensor) -> np.ndarray:
    """src's elements in dst's type."""
    check_written(src)
    if src.dtype is dst.dtype or src.dtype.store == dst.dtype.store:
        return src.data
    return dtypes.from_float(dtypes.to_float(src.data, src.dtype), dst.dtype)


def _move(dst: Tensor, values: np.ndarray) -> None:
    dst.data[...] = values
    mark(dst)


def _addresses(what: str, x: Tensor, mode) -> tuple[np.ndarray, np.ndarray]:
    """(flat index (rows, rest), which rows are inside) of an indirect view."""
    gather = x.gather
    rest = np.zeros(1, np.int64)
    for step, count in gather.pattern[1:]:
        rest = (rest[:, None] + step * np.arange(count)).reshape(-1)
    index = raw(gather.index).astype(np.int64).reshape(-1)
    index = index & 0xFFFFFFFF  # the hardware reads it unsigned
    flat = gather.offset + index[:, None] * gather.stride + rest
    inside = (flat < x.storage.array.size).all(1) & (flat >= 0).all(1)
    if mode is not oob_modes.skip and not inside.all():
        bad = int(index[~inside][0])
        refuse(f"{what}: index {bad} lies outside {x!r}; oob_mode.skip would leave it out")
    return np.where(inside[:, None], flat, 0), inside


def _gather(what: str, dst: Tensor, src: Tensor, mode) -> None:
    flat, inside = _addresses(what, src, mode)
    source = src.storage.array.reshape(-1)[flat]
    if not src.storage.full:
        written = src.storage.written.reshape(-1)[flat[inside]]
        require(bool((written != 0).all()), f"{what}: {src!r} is read before it was written")
    if src.dtype is not dst.dtype:
        source = dtypes.from_float(dtypes.to_float(source, src.dtype), dst.dtype)
    if inside.all():
        _move(dst, source.reshape(dst.shape))
        return
    if dst.shape[0] != inside.size:
        refuse(f"{what}: with oob_mode.skip dst must have a row for each index")
    rows = np.flatnonzero(inside)
    dst.data[rows] = source[rows].reshape(len(rows), *dst.shape[1:])
    if not dst.storage.full:
        dst.written[rows] = np.iinfo(dst.written.dtype).max


def _scatter(what: str, dst: Tensor, src: Tensor, mode) -> None:
    flat, inside = _addresses(what, dst, mode)
    values = _values(src, dst).reshape(flat.shape)
    dst.storage.array.reshape(-1)[flat[inside]] = values[inside]
    if not dst.storage.full:
        mask = dst.storage.written.reshape(-1)
        mask[flat[inside]] = np.iinfo(mask.dtype).max


_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def dma_transpose(dst, src, axes=None, priority=None, dge_mode=dge_modes.unknown,
                  oob_mode=oob_modes.error, name=None):  # fmt: skip
    """dst in SBUF = src with its dimensions turned round, at 90 % (50 % from SBUF) of a copy."""
    what, machine = "dma_transpose", current()
    check_reach(what, "dst", dst)
    check_reach(what, "src", src)
    require(src.gather is None, f"{what}: indirect sources are not interpreted")
    require(dst.buffer is SBUF, f"{what}: dst must be in SBUF, got {dst!r}")
    require(dst.dtype is src.dtype, f"{what}: dst and src must be of one type")
    order = _AXES.get(src.ndim)
    if order is None or (axes is not None and tuple(axes) != order):
        refuse(f"{what}: axes must be (1, 0), (2, 1, 0) or (3, 1, 2, 0), got {axes} for {src!r}")
    shape = tuple(src.shape[a] for a in order)
    if dst.shape != shape:
        refuse(f"{what}: dst must be of shape {shape}, got {dst.shape}")
    if dge_mode is dge_modes.hwdge:
        _check_hwdge(machine, src)
    _meter_transpose(machine, what, dst, src)
    if not machine.dry:
        check_written(src)
        _move(dst, src.data.transpose(order))
    return HANDLE


def _check_hwdge(machine, src: Tensor) -> None:
    from_generation(machine, 3, "dma_transpose with hwdge")
    rows = src.shape[0] == 16 if src.ndim == 2 else src.shape[0] in (1, 2, 4, 8, 16)
    if src.itemsize != 2 or src.shape[-1] > 128 or not rows:
        refuse(f"dma_transpose: hwdge takes 2-byte types, a last dimension up to 128 and 16 rows, "
               f"got {src!r}")  # fmt: skip


def _meter_transpose(machine, what: str, dst: Tensor, src: Tensor) -> None:
    moved = src.size * src.itemsize
    rate = min(machine.target.dma_rate, math.inf if src.on_chip else machine.target.hbm_rate)
    share = 0.5 if src.on_chip else 0.9
    meter = machine.meter
    meter.instructions["dma", what] += 1
    # Types of other sizes than two bytes go element by element.
    meter.dma_seconds += moved / (rate * share) * (1 if src.itemsize == 2 else SHORT_RUN / 16)
    meter.moved["read"] += 0 if src.on_chip else moved


def dma_compute(dst, srcs, reduce_op, scales=None, unique_indices=True,
                oob_mode=oob_modes.error, name=None):  # fmt: skip
    """dst = the fp32 sum of up to 16 sources; with an indirect dst, a scatter that adds."""
    what, machine = "dma_compute", current()
    check_reach(what, "dst", dst)
    require(1 <= len(srcs) <= 16, f"{what}: 1 to 16 sources, got {len(srcs)}")
    for x in srcs:
        check_reach(what, "src", x)
        require(x.size == dst.size, f"{what}: {x!r} and {dst!r} must have as many elements")
    require(operator(what, "reduce_op", reduce_op).name == "add", f"{what}: reduces by nl.add")
    require(scales is None or all(s == 1.0 for s in scales), f"{what}: scales must be 1.0")
    for x in srcs:
        meter(machine, what, dst, x)
    if machine.dry:
        return HANDLE
    if dst.gather is not None:
        flat, inside = _addresses(what, dst, oob_mode)
        used = flat[inside]
        require(np.unique(used).size == used.size, f"{what}: an index occurs twice")
        array = dst.storage.array.reshape(-1)
        total = array[flat].astype(np.float32)
        for x in srcs:
            if x.gather is None:
                total = total + read(x).reshape(flat.shape)
        array[used] = dtypes.from_float(total, dst.dtype)[inside]
        return HANDLE
    total = np.zeros(dst.shape, np.float32)
    for x in srcs:
        total = total + dtypes.to_float(_values(x, x), x.dtype).reshape(dst.shape)
    _move(dst, dtypes.from_float(total, dst.dtype))
    return HANDLE
