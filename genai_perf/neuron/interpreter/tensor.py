"""Tensors: views of a Storage, made without moving data."""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .dtypes import MASK, DType, resolve
from .errors import refuse
from .memory import PSUM, SBUF, Storage
from .targets import PARTITIONS


@dataclass(frozen=True)
class ds:
    """`nl.ds(start, size)`: a slice by its length."""

    start: int
    size: int


@dataclass(frozen=True)
class Gather:
    """A view whose first dimension is looked up: for DMA only."""

    index: "Tensor"
    stride: int
    offset: int
    pattern: tuple[tuple[int, int], ...]


class Tensor:
    """What kernels hold: shape, dtype, buffer, and views of them.

    data, written, summed: views of the storage's arrays, of one shape and the same strides.
    """

    __slots__ = ("data", "dtype", "gather", "storage", "summed", "written")

    def __init__(self, storage: Storage, data, written, summed, dtype: DType, gather=None):
        self.storage, self.data, self.written = storage, data, written
        self.summed, self.dtype, self.gather = summed, dtype, gather

    @classmethod
    def whole(cls, storage: Storage) -> "Tensor":
        return cls(storage, storage.array, storage.written, storage.summed, storage.dtype)

    # --- what it is ---------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def buffer(self):
        return self.storage.buffer

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def on_chip(self) -> bool:
        return self.storage.buffer.on_chip

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(s // self.itemsize for s in self.data.strides)

    @property
    def offset(self) -> int:
        """In elements, from the start of the storage."""
        return self._byte_offset() // self.itemsize

    @property
    def partition(self) -> int:
        """The first partition that it lies on."""
        return self._byte_offset() // max(1, self.storage.free_size * self.storage.dtype.itemsize)

    @property
    def free(self) -> int:
        """Elements of one partition."""
        return self.data.size // max(1, self.data.shape[0])

    def _byte_offset(self) -> int:
        here, base = self.data.ctypes.data, self.storage.array.ctypes.data
        return here - base if self.data.size else 0

    def get_pattern(self) -> list[list[int]]:
        return [list(pair) for pair in zip(self.strides, self.shape, strict=True)]

    def is_contiguous(self) -> bool:
        """On chip: of the free dimensions."""
        view = self.data[0] if self.on_chip else self.data
        return view.flags.c_contiguous

    def is_indirect(self) -> bool:
        return self.gather is not None

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{self.name or 'tensor'}{list(self.shape)} {self.dtype} in {self.buffer}"

    def __bool__(self) -> bool:
        refuse(f"{self!r} is not known when the kernel is compiled: it cannot decide a branch")

    # --- views --------------------------------------------------------------------------------

    def _map(self, view, dtype: DType | None = None) -> "Tensor":
        """The same view of data and of what tracks it."""
        data = view(self.data)
        written = None if self.storage.full or self.written is None else view(self.written)
        summed = None if self.summed is None else view(self.summed)
        return Tensor(self.storage, data, written, summed, dtype or self.dtype)

    def __getitem__(self, key) -> "Tensor":
        key = key if isinstance(key, tuple) else (key,)
        if Ellipsis in [k for k in key if k is Ellipsis]:
            at = next(i for i, k in enumerate(key) if k is Ellipsis)
            key = key[:at] + (slice(None),) * (self.ndim - len(key) + 1) + key[at + 1 :]
        if len(key) > self.ndim:
            refuse(f"{len(key)} indices for {self!r}")
        index = [self._index(dim, k) for dim, k in enumerate(key)]
        index += [slice(0, size) for size in self.shape[len(key) :]]
        if self.on_chip:
            if isinstance(index[0], int):
                index[0] = slice(index[0], index[0] + 1)
            kept = sum(isinstance(k, slice) for k in index)
            for dim in reversed(range(1, len(index))):  # a tile keeps two dimensions
                if kept < 2 and isinstance(index[dim], int):
                    index[dim] = slice(index[dim], index[dim] + 1)
                    kept += 1
        elif not any(isinstance(k, slice) for k in index):
            index[-1] = slice(index[-1], index[-1] + 1)
        index = tuple(index)
        return self._map(lambda x: x[index])

    def _index(self, dim: int, key):
        """An int >= 0 or a slice within bounds."""
        size = self.shape[dim]
        if isinstance(key, ds):
            key = slice(key.start, key.start + key.size)
        if isinstance(key, slice):
            start = 0 if key.start is None else int(key.start)
            stop = size if key.stop is None else int(key.stop)
            step = 1 if key.step is None else int(key.step)
            start += size if start < 0 else 0
            stop += size if stop < 0 else 0
            if step < 1:
                refuse(f"a slice step must be positive, got {step} in dimension {dim}")
            if not 0 <= start <= stop <= size:
                refuse(f"slice {start}:{stop} leaves dimension {dim} of {self!r}")
            if dim == 0 and step != 1 and self.on_chip:
                refuse(f"partitions cannot be strided, got step {step}")
            return slice(start, stop, step)
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            at = int(key) + (size if key < 0 else 0)
            if not 0 <= at < size:
                refuse(f"index {key} is outside dimension {dim} of {self!r}")
            return at
        refuse(f"an index is an int, a slice or nl.ds, got {type(key).__name__}")

    def reshape(self, shape) -> "Tensor":
        shape = self._completed(tuple(int(n) for n in shape))
        if self.on_chip and shape[0] != self.shape[0]:
            refuse(f"reshape cannot change the partitions: {self.shape} to {shape}")
        if np.prod(shape, dtype=np.int64) != self.size:
            refuse(f"reshape of {self.shape} to {shape} changes the number of elements")

        def view(x):
            try:
                return x.reshape(shape, copy=False)
            except ValueError:
                refuse(f"{self!r} is strided: it has no view of shape {shape}")

        return self._map(view)

    def _completed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape.count(-1) != 1:
            return shape
        rest = -int(np.prod(shape, dtype=np.int64))
        return tuple(self.size // max(1, rest) if n == -1 else n for n in shape)

    def permute(self, dims) -> "Tensor":
        if sorted(dims) != list(range(self.ndim)) or (self.on_chip and dims[0] != 0):
            refuse(f"permute{tuple(dims)} of {self!r}: partitions stay first")
        return self._map(lambda x: x.transpose(dims))

    def broadcast(self, dim: int, size: int) -> "Tensor":
        if self.shape[dim] != 1 or (self.on_chip and dim == 0):
            refuse(f"only a free dimension of size 1 can be broadcast, got {dim} of {self!r}")
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return self._map(lambda x: np.broadcast_to(x, shape))

    def expand_dim(self, dim: int) -> "Tensor":
        if self.on_chip and dim == 0:
            refuse("expand_dim(0): the partitions stay first")
        return self._map(lambda x: np.expand_dims(x, dim))

    def squeeze_dim(self, dim: int) -> "Tensor":
        if self.shape[dim] != 1 or (self.on_chip and (dim == 0 or self.ndim == 2)):
            refuse(f"squeeze_dim({dim}) of {self!r}")
        return self._map(lambda x: x.squeeze(dim))

    def reshape_dim(self, dim: int, shape) -> "Tensor":
        return self.reshape((*self.shape[:dim], *shape, *self.shape[dim + 1 :]))

    def flatten_dims(self, start: int, end: int) -> "Tensor":
        merged = int(np.prod(self.shape[start : end + 1], dtype=np.int64))
        return self.reshape((*self.shape[:start], merged, *self.shape[end + 1 :]))

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> "Tensor":
        return self[(slice(None),) * dim + (slice(start, end, step),)]

    def select(self, dim: int, index: int) -> "Tensor":
        return self[(slice(None),) * dim + (index,)]

    def view(self, dtype) -> "Tensor":
        """The same bits as another type; the last dimension grows or shrinks with the size."""
        dtype = resolve(dtype)
        if dtype.itemsize == self.itemsize:
            return self._map(lambda x: x.view(dtype.store if x is self.data else x.dtype), dtype)
        last = self.shape[-1] * self.itemsize
        if self.strides[-1] != 1 or last % dtype.itemsize or (
            any(s * self.itemsize % dtype.itemsize for s in self.strides[:-1])
        ):  # fmt: skip
            refuse(f"{self!r} cannot be read as {dtype}: {last} contiguous bytes needed whole")
        mask = MASK[dtype.itemsize]
        return self._map(lambda x: x.view(dtype.store if x is self.data else mask), dtype)

    reinterpret_cast = view

    def ap(self, pattern, offset=None, scalar_offset=None, vector_offset=None, indirect_dim=0,
           dtype=None) -> "Tensor":  # fmt: skip
        """An access pattern [[step, count], ...] over the elements of the storage."""
        pattern = tuple((int(step), int(count)) for step, count in pattern)
        storage, start = self.storage, self.offset if offset is None else int(offset)
        if dtype is not None and resolve(dtype) is not self.dtype:
            return Tensor.whole(storage).view(dtype).ap(pattern, start, scalar_offset,
                                                        vector_offset, indirect_dim)  # fmt: skip
        strides = self.strides
        if scalar_offset is not None:
            moved = scalar_offset.item() if isinstance(scalar_offset, Tensor) else scalar_offset
            start += int(moved) * int(strides[indirect_dim])
        if vector_offset is not None:
            return self._gathered(vector_offset, int(strides[indirect_dim]), start, pattern)
        self._check_pattern(pattern, start)
        shape = tuple(count for _, count in pattern)

        def view(x):
            flat = x.reshape(-1)[start:]
            return as_strided(flat, shape, [step * x.itemsize for step, _ in pattern])

        base = Tensor.whole(storage)
        if self.dtype is not storage.dtype:
            base = base.view(self.dtype)
        return base._map(view)

    def _gathered(self, index, stride: int, start: int, pattern) -> "Tensor":
        if self.on_chip:
            refuse("vector_offset reads and writes HBM tensors only")
        if index.buffer is not SBUF or index.dtype.name not in ("uint32", "int32"):
            refuse(f"vector_offset must be uint32 in SBUF, got {index!r}")
        if index.size != pattern[0][1]:
            refuse(f"vector_offset has {index.size} indices for {pattern[0][1]} rows")
        shape = tuple(count for _, count in pattern)
        placeholder = np.broadcast_to(self.storage.array.reshape(-1)[:1], shape)
        gather = Gather(index, stride, start, pattern)
        return Tensor(self.storage, placeholder, None, None, self.dtype, gather)

    def _check_pattern(self, pattern, start: int) -> None:
        total = self.storage.array.size * self.storage.dtype.itemsize // self.itemsize
        low = start + sum(min(0, step * (count - 1)) for step, count in pattern)
        high = start + sum(max(0, step * (count - 1)) for step, count in pattern)
        if any(count < 1 for _, count in pattern) or low < 0 or high >= total:
            refuse(f"access pattern {list(map(list, pattern))} at {start} leaves the {total} "
                   f"elements of {self.storage.name or 'the tensor'}")  # fmt: skip
        if not self.on_chip:
            return
        row = self.storage.free_size * self.storage.dtype.itemsize // self.itemsize
        step, count = pattern[0]
        if count > 1 and step != row:
            refuse(f"the first pair of an on-chip access pattern steps over partitions: its step "
                   f"must be {row}, got {step}")  # fmt: skip
        reach = start % row + sum(max(0, s * (n - 1)) for s, n in pattern[1:])
        if reach >= row or count > PARTITIONS:
            refuse(f"access pattern {list(map(list, pattern))} runs from one partition to the next")

    def item(self):
        """The one number of a 1x1 tile, for registers."""
        if self.size != 1:
            refuse(f"a register holds one number, got {self!r}")
        return self.data.reshape(-1)[0].item()

    # --- for the interpreter ------------------------------------------------------------------

    def rows(self) -> np.ndarray:
        """The elements, (partitions, elements of one)."""
        return self.data.reshape(self.shape[0], -1)

    def in_psum(self) -> bool:
        return self.storage.buffer is PSUM
