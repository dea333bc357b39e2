"""Instructions of GpSimd: index patterns, selects by them, gathers; and statistics of Vector."""

import numpy as np

from . import dtypes
from .alu import OPS, operator
from .errors import refuse, require
from .machine import (
    HANDLE,
    check_tiles,
    current,
    from_generation,
    mark,
    moved,
    operand,
    raw,
    read,
    same_shape,
    store,
    tile,
)
from .tensor import Tensor
from .vector_engine import check_sbuf


def _affine(what: str, dst: Tensor, pattern, offset: int, channel_multiplier: int) -> np.ndarray:
    """offset + p * channel_multiplier + sum(step * i), (partitions, elements), int32."""
    if not 1 <= len(pattern) <= 4:
        refuse(f"{what}: pattern has 1 to 4 pairs, got {len(pattern)}")
    value = np.zeros(1, np.int64)
    for step, count in pattern:
        value = (value[:, None] + int(step) * np.arange(int(count))).reshape(-1)
    if value.size != dst.free:
        refuse(f"{what}: pattern {pattern} has {value.size} elements, dst {dst.shape} has "
               f"{dst.free} a partition")  # fmt: skip
    rows = int(offset) + int(channel_multiplier) * np.arange(dst.shape[0])
    return (rows[:, None] + value).astype(np.int32)


def iota(dst, pattern, offset=0, channel_multiplier=0, name=None):
    """dst[p, i..] = offset + p * channel_multiplier + sum of step * i."""
    what, machine = "iota", current()
    check_sbuf(what, dst=dst)
    values = _affine(what, dst, pattern, offset, channel_multiplier)
    machine.issue("gpsimd", what, 150 + dst.free)
    if machine.dry:
        return HANDLE
    if dst.dtype.kind == "int":
        store(dst, values.astype(dst.dtype.store), bits=True)
    else:
        store(dst, values.astype(np.float32))
    return HANDLE


def affine_select(dst, pattern, channel_multiplier, on_true_tile, on_false_value, cmp_op=None,
                  offset=0, name=None):  # fmt: skip
    """Keep on_true_tile where cmp_op(affine value, 0), else on_false_value."""
    what, machine = "affine_select", current()
    check_sbuf(what, dst=dst, on_true_tile=on_true_tile)
    same_shape(what, dst, on_true_tile=on_true_tile)
    op = OPS["equal"] if cmp_op is None else operator(what, "cmp_op", cmp_op)
    value = _affine(what, dst, pattern, offset, channel_multiplier)
    other = operand(what, "on_false_value", on_false_value, machine, dst.shape[0])
    machine.issue("gpsimd", what, 150 + dst.free)
    if not machine.dry:
        keep = op.run(value, 0) != 0
        store(dst, np.where(keep, read(on_true_tile), other).astype(np.float32))
    return HANDLE


def tensor_partition_reduce(dst, op, data, name=None):
    """Over partitions; slow, a matmul with ones is better."""
    what, machine = "tensor_partition_reduce", current()
    check_sbuf(what, dst=dst, data=data)
    op = operator(what, "op", op)
    if dst.shape[0] != 1 or dst.free != data.free or op.reduce is None:
        refuse(f"{what}: dst must be (1, {data.free}) and op a reduction")
    machine.issue("gpsimd", what, 150 + data.shape[0] * data.free / 16)
    if not machine.dry:
        store(dst, op.reduce(read(data).T)[None])
    return HANDLE


def nc_n_gather(dst, data, indices, name=None):
    """dst[p, i] = data[p, indices[p, i]]."""
    what, machine = "nc_n_gather", current()
    check_sbuf(what, dst=dst, data=data, indices=indices)
    require(indices.dtype is dtypes.uint32, f"{what}: indices must be uint32, got {indices!r}")
    require(dst.dtype is data.dtype, f"{what}: dst and data must be of one type")
    if dst.shape[0] != data.shape[0] or indices.shape[0] != dst.shape[0] or (
        indices.free != dst.free
    ):  # fmt: skip
        refuse(f"{what}: dst {dst.shape}, data {data.shape} and indices {indices.shape} differ")
    machine.issue("gpsimd", what, 150 + 2 * dst.free)
    if machine.dry:
        return HANDLE
    at = raw(indices).astype(np.int64)
    if at.max() >= data.free:
        refuse(f"{what}: index {at.max()} is outside the {data.free} elements of a partition")
    store(dst, np.take_along_axis(raw(data), at, 1), bits=True)
    return HANDLE


def local_gather(dst, src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, name=None):
    """By groups of 16 partitions: they share the indices, flattened partition first."""
    what, machine = "local_gather", current()
    check_sbuf(what, dst=dst, src_buffer=src_buffer, index=index)
    each = num_elem_per_idx
    require(index.dtype is dtypes.uint16, f"{what}: index must be uint16, got {index!r}")
    require(dst.dtype is src_buffer.dtype, f"{what}: dst and src_buffer must be of one type")
    require(each in (1, 2, 4, 8, 16, 32), f"{what}: num_elem_per_idx is 1 to 32, a power of two")
    require(src_buffer.shape[0] % 16 == 0, f"{what}: partitions must be a multiple of 16")
    valid = index.free * 16 if num_valid_indices is None else num_valid_indices
    require(valid <= 4096, f"{what}: at most 4096 indices for 16 partitions, got {valid}")
    machine.issue("gpsimd", what, 150 + 2 * valid * each)
    if machine.dry:
        return HANDLE
    source, at, out = raw(src_buffer), raw(index), dst.rows().copy()
    for group in range(0, source.shape[0], 16):
        flat = at[group : group + 16].T.reshape(-1)[:valid].astype(np.int64)
        columns = (flat[:, None] * each + np.arange(each)).reshape(-1)
        if columns.max() >= source.shape[1]:
            refuse(f"{what}: index {flat.max()} is outside src_buffer {src_buffer.shape}")
        out[group : group + 16, : columns.size] = source[group : group + 16, columns]
    dst.data[...] = out.reshape(dst.shape)
    mark(dst)
    return HANDLE


def nc_stream_shuffle(dst, src, shuffle_mask, name=None):
    """Inside each quadrant of 32 partitions, partition i takes shuffle_mask[i]; 255 keeps it."""
    what, machine = "nc_stream_shuffle", current()
    check_tiles(what, dst, src=src)
    require(dst.dtype is src.dtype and len(shuffle_mask) == 32,
            f"{what}: one type and 32 entries needed")  # fmt: skip
    machine.issue("vector", what, dst.free)
    if machine.dry:
        return HANDLE
    at = np.array([p // 32 * 32 + shuffle_mask[p % 32] for p in range(src.shape[0])])
    keep = np.array([shuffle_mask[p % 32] == 255 for p in range(src.shape[0])])[:, None]
    at[keep[:, 0]] = 0
    (rows, got), (old, had) = (moved(x, dst, bits=True) for x in (src, dst))
    written, every = None, np.ones(rows.shape, bool)
    if got is not None or had is not None:
        written = np.where(keep, every if had is None else had, (every if got is None else got)[at])
    store(dst, np.where(keep, old, rows[at]), bits=True, written=written)
    return HANDLE


def nonzero_with_count(dst, src, index_offset=0, padding_val=-1, name=None):
    """Of partitions 0, 16 .. 112: where src is not 0, then padding, and last how many there are."""
    what, machine = "nonzero_with_count", current()
    from_generation(machine, 3, what)
    check_sbuf(what, dst=dst, src=src)
    require(dst.dtype is dtypes.int32, f"{what}: dst must be int32, got {dst!r}")
    if dst.shape[0] != src.shape[0] or dst.free != src.free + 1:
        refuse(f"{what}: dst {dst.shape} must have one element a partition more than src "
               f"{src.shape}")  # fmt: skip
    machine.issue("gpsimd", what, 150 + src.free)
    if machine.dry:
        return HANDLE
    for p in range(0, src.shape[0], 16):
        values, written = moved(src[p : p + 1], dst[p : p + 1])
        if written is not None:  # a core without a row of its own: so is what it writes
            continue
        found = np.flatnonzero(values[0])
        row = np.full(dst.free, padding_val, np.int32)
        row[: found.size] = found + index_offset
        row[-1] = found.size
        store(dst[p : p + 1], row, bits=True)
    return HANDLE


def bn_stats(dst, data, name=None):
    """count, mean and sum of squares about it of the even, then of the odd elements."""
    what, machine = "bn_stats", current()
    tile(what, "dst", dst)
    tile(what, "data", data)
    if data.free > 512 or dst.shape[0] != data.shape[0] or dst.free != 6:
        refuse(f"{what}: data {data.shape} up to 512 elements a row, dst {dst.shape} (P, 6)")
    machine.issue("vector", what, data.free)
    if machine.dry:
        return HANDLE
    x, out = read(data), np.zeros((data.shape[0], 6), np.float32)
    for half in range(2):
        part = x[:, half::2]
        if part.shape[1]:
            mean = part.mean(1)
            out[:, 3 * half : 3 * half + 3] = np.stack(
                [np.full_like(mean, part.shape[1]), mean, ((part - mean[:, None]) ** 2).sum(1)], 1
            )
    store(dst, out)
    return HANDLE


def bn_aggr(dst, data, name=None):
    """mean and population variance of groups of (count, mean, sum of squares)."""
    what, machine = "bn_aggr", current()
    tile(what, "dst", dst)
    tile(what, "data", data)
    if data.free % 3 or dst.shape[0] != data.shape[0] or dst.free != 2:
        refuse(f"{what}: data {data.shape} must be (P, 3 n), dst {dst.shape} (P, 2)")
    machine.issue("vector", what, 13 * data.free / 3)
    if machine.dry:
        return HANDLE
    count, mean, squares = (read(data).reshape(data.shape[0], -1, 3)[:, :, i] for i in range(3))
    total = count.sum(1, keepdims=True)
    overall = (count * mean).sum(1, keepdims=True) / total
    spread = (squares + count * (mean - overall) ** 2).sum(1, keepdims=True) / total
    store(dst, np.concatenate([overall, spread], 1))
    return HANDLE


def max8(dst, src, name=None):
    """The 8 largest of each row, falling."""
    what, machine = "max8", current()
    tile(what, "dst", dst)
    tile(what, "src", src)
    if not 8 <= src.free <= 16384 or dst.shape[0] != src.shape[0] or dst.free != 8:
        refuse(f"{what}: src {src.shape} of 8 to 16384 elements a row, dst {dst.shape} (P, 8)")
    machine.issue("vector", what, src.free)
    if not machine.dry:
        store(dst, -np.sort(-read(src), axis=1)[:, :8])
    return HANDLE


def nc_find_index8(dst, data, vals, name=None):
    """The index of each of 8 values in its row; equal values take successive places."""
    what, machine = "nc_find_index8", current()
    for n, x in (("dst", dst), ("data", data), ("vals", vals)):
        tile(what, n, x)
    require(dst.dtype.name in ("uint16", "uint32") and dst.free == 8 and vals.free == 8,
            f"{what}: dst uint16 or uint32 (P, 8), vals (P, 8)")  # fmt: skip
    machine.issue("vector", what, data.free)
    if machine.dry:
        return HANDLE
    rows, wanted = read(data), read(vals)
    out = np.full(wanted.shape, np.iinfo(dst.dtype.store).max, dst.dtype.store)
    for p in range(rows.shape[0]):
        used: dict[float, int] = {}
        for i, value in enumerate(wanted[p]):
            places, nth = np.flatnonzero(rows[p] == value), used.get(float(value), 0)
            if nth < places.size:
                out[p, i] = places[nth]
            used[float(value)] = nth + 1
    store(dst, out, bits=True)
    return HANDLE


def nc_match_replace8(dst, data, vals, imm, dst_idx=None, name=None):
    """The first match of each of 8 values replaced by imm, the last value first."""
    what, machine = "nc_match_replace8", current()
    for n, x in (("dst", dst), ("data", data), ("vals", vals)):
        tile(what, n, x)
    same_shape(what, dst, data=data)
    machine.issue("vector", what, data.free)
    if machine.dry:
        return HANDLE
    out, wanted = read(data).copy(), read(vals)
    index = np.full(wanted.shape, np.iinfo(np.uint16).max, np.int64)
    for p in range(out.shape[0]):
        for i in reversed(range(wanted.shape[1])):
            places = np.flatnonzero(out[p] == wanted[p, i])
            if places.size:
                out[p, places[0]], index[p, i] = imm, places[0]
    store(dst, out)
    if dst_idx is not None:
        store(dst_idx, index.astype(dst_idx.dtype.store), bits=True)
    return HANDLE
