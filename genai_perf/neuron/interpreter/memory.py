"""Memories: who holds what, which elements were written, and how full SBUF and PSUM got."""

import numpy as np

from .dtypes import MASK, DType
from .errors import refuse
from .targets import PARTITIONS, Target


class Buffer:
    """A memory region, compared by identity."""

    def __init__(self, name: str, on_chip: bool):
        self.name, self.on_chip = name, on_chip

    def __repr__(self) -> str:
        return self.name


SBUF, PSUM = Buffer("sbuf", True), Buffer("psum", True)
HBM, PRIVATE_HBM = Buffer("hbm", False), Buffer("private_hbm", False)
SHARED_HBM = Buffer("shared_hbm", False)


class Storage:
    """One allocation.

    array: the elements, NaN or a marker until written.
    written: as many bytes, all ones where an element was written, so that a view of both with
        another element type still says which elements are whole.
    summed: the same for PSUM, all ones where the last write was a matmul's.
    full: every element was written; nothing is tracked from then on.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DType, buffer: Buffer, name: str,
                 release=None, array: np.ndarray | None = None):  # fmt: skip
        self.shape, self.dtype, self.buffer, self.name = shape, dtype, buffer, name
        self.full = array is not None
        self.array = np.empty(shape, dtype.store) if array is None else array
        mask = MASK[dtype.itemsize]
        self.written = None if self.full else np.zeros(shape, mask)
        self.summed = np.zeros(shape, mask) if buffer is PSUM else None
        self.bank_offset = 0
        self._release = release

    @property
    def free_size(self) -> int:
        """Elements of one partition."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def __del__(self):
        if self._release is not None:
            self._release()


class OnChip:
    """SBUF and PSUM of one core: tiles live as long as the kernel can reach them."""

    def __init__(self, target: Target):
        self.target = target
        self.sbuf_used = self.sbuf_peak = self.psum_peak = 0
        # Of each PSUM bank, the (start, end) bytes of the tiles in it.
        self.banks: list[set[tuple[int, int]]] = [set() for _ in range(target.psum_banks)]

    def allocate(self, shape, dtype: DType, buffer: Buffer, name: str, address=None) -> Storage:
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        if len(shape) < 2:
            refuse(f"a tile in {buffer} needs two dimensions or more, got {tuple(shape)}")
        if not 1 <= shape[0] <= PARTITIONS:
            refuse(f"a tile has 1 to {PARTITIONS} partitions, got {shape[0]} in {tuple(shape)}")
        if size == 0:
            refuse(f"a tile must not be empty, got {tuple(shape)}")
        if address is not None:
            return self._by_hand(shape, dtype, buffer, name, size, address)
        if buffer is SBUF:
            return self._sbuf(shape, dtype, name, -(-size // 4) * 4)
        return self._psum(shape, dtype, name, size)

    def _by_hand(self, shape, dtype, buffer, name, size, address) -> Storage:
        """A tile at an address of the kernel's choice; overlaps are the kernel's own affair."""
        start = address[1]
        limit = self.target.sbuf_bytes if buffer is SBUF else (
            self.target.psum_banks * self.target.bank_bytes
        )  # fmt: skip
        if start + size > limit:
            refuse(f"a tile of {size} bytes at byte {start} ends past the {limit} of {buffer}")
        if buffer is SBUF:
            self.sbuf_peak = max(self.sbuf_peak, start + size)
        else:
            self.psum_peak = max(self.psum_peak, start + size)
        storage = Storage(shape, dtype, buffer, name)
        storage.bank_offset = start % self.target.bank_bytes
        return storage

    def _sbuf(self, shape, dtype, name, size: int) -> Storage:
        if self.sbuf_used + size > self.target.sbuf_bytes:
            refuse(
                f"SBUF is full: {self.sbuf_used} bytes of a partition are in use and a tile "
                f"{tuple(shape)} of {dtype} needs {size} more; {self.target.name} has "
                f"{self.target.sbuf_bytes}"
            )
        self.sbuf_used += size
        self.sbuf_peak = max(self.sbuf_peak, self.sbuf_used)

        def release():
            self.sbuf_used -= size

        return Storage(shape, dtype, SBUF, name, release)

    def _psum(self, shape, dtype, name, size: int) -> Storage:
        count = -(-size // self.target.bank_bytes)
        found = self._find(size) if count == 1 else self._find_banks(count)
        if found is None:
            refuse(
                f"PSUM is full: no room for a tile {tuple(shape)} of {dtype} ({size} bytes) in "
                f"{self.target.psum_banks} banks of {self.target.bank_bytes}, "
                f"{self._in_use()} bytes in use"
            )
        first, start = found
        end = start + size if count == 1 else self.target.bank_bytes
        taken = [self.banks[first + i] for i in range(count)]
        for bank in taken:
            bank.add((start, end))
        self.psum_peak = max(self.psum_peak, self._in_use())

        def release():
            for bank in taken:
                bank.discard((start, end))

        storage = Storage(shape, dtype, PSUM, name, release)
        storage.bank_offset = start
        return storage

    def _in_use(self) -> int:
        return sum(end - start for bank in self.banks for start, end in bank)

    def _find(self, size: int) -> tuple[int, int] | None:
        """(bank, byte) of the first gap of `size` bytes, an empty bank before a shared one."""
        for index, bank in enumerate(self.banks):
            if not bank:
                return index, 0
        for index, bank in enumerate(self.banks):
            start = 0
            for taken, end in sorted(bank):
                if taken - start >= size:
                    break
                start = end
            if start + size <= self.target.bank_bytes:
                return index, start
        return None

    def _find_banks(self, count: int) -> tuple[int, int] | None:
        for first in range(len(self.banks) - count + 1):
            if not any(self.banks[first : first + count]):
                return first, 0
        return None
