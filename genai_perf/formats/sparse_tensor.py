"""SparseTensor: a pruned weight without its zeros; its layouts are sparse24 and sparse."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .._checks import check_dtype, check_ndim, check_tensor, fail
from .._errors import CheckpointError
from . import int4
from .base import FLOATS, Components, QuantizedTensor, ceil_div, check_finite

LAYOUTS = ("2:4", "bitmask")
# Columns that share a byte of the index: rows are padded with zeros to a multiple of it.
UNIT = 8
_COMPONENTS = ("values", "index", "scale")


@dataclass(eq=False)
class SparseTensor(Components):
    """A matrix stored as its kept values and where they stand.

    Attributes:
        layout: "2:4" (`sparse24`) or "bitmask" (`sparse`).
        shape: logical shape (N, K) = (out_features, in_features).
        dtype: what `to_dense` gives by default.
        values: the kept values: fp32, bf16 or fp16; or int8 codes; or uint8, two 4-bit codes plus 8
            a byte, the first in the low nibble. (N, kept a row) in layout "2:4", else flat.
        index: uint8 (N, ceil(K / 8)), which columns are kept.
        scale: what codes are multiplied by: fp32 (N, 1) for int8, (N, ceil(K / group_size)) in any
            float dtype for 4 bits; None where values are floats.
        group_size: columns that share a scale, -1 for the row.
        row_start: int64 (N + 1), where each row's values begin in a bitmask layout, 4-bit codes
            counted one by one; made from the index, and not stored.
    """

    layout: str
    shape: torch.Size
    dtype: torch.dtype
    values: torch.Tensor
    index: torch.Tensor
    scale: torch.Tensor | None = None
    group_size: int = -1
    row_start: torch.Tensor | None = field(default=None, repr=False)
    parts = _COMPONENTS

    def __post_init__(self):
        self.shape = torch.Size(self.shape)
        if self.layout == "bitmask" and self.row_start is None:
            self.row_start = row_starts(self.index, self.bits == 4)

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return 4 if self.values.dtype == torch.uint8 else 8 * self.values.element_size()

    def to(self, device: torch.device | str) -> "SparseTensor":
        moved = {name: tensor.to(device) for name, tensor in self.components().items()}
        start = None if self.row_start is None else self.row_start.to(device)
        return SparseTensor(self.layout, self.shape, self.dtype, group_size=self.group_size,
                            row_start=start, **moved)  # fmt: skip

    def codes(self) -> torch.Tensor:
        """(N, K): float values, or int8 codes without their scale; zero where pruned."""
        from . import sparse, sparse24

        return (sparse24 if self.layout == "2:4" else sparse).expand(self)

    def to_dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The (N, K) matrix that this stands for, rounded once from fp32 to `dtype`."""
        dense = self.codes().float()
        if self.scale is not None:
            width = self.group_size if self.group_size > 0 else max(1, self.shape[1])
            dense *= self.scale.float().repeat_interleave(width, 1)[:, : self.shape[1]]
        return dense.to(dtype or self.dtype)

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Plain tensors: the components under `prefix` + name, and `prefix` + "meta", JSON in
        uint8."""
        meta = {"layout": self.layout, "shape": list(self.shape), "group_size": self.group_size,
                "dtype": str(self.dtype).removeprefix("torch.")}  # fmt: skip
        state = {prefix + name: tensor for name, tensor in self.components().items()}
        state[prefix + "meta"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], prefix: str = "") -> "SparseTensor":
        """Reads what `state_dict(prefix)` wrote, and checks it; other keys are left alone.

        Raises:
            CheckpointError: a component is missing, or does not fit the others.
        """
        name = f"sparse tensor: {prefix}meta"
        if prefix + "meta" not in state:
            raise CheckpointError(f"{name} is missing")
        try:
            meta = json.loads(bytes(state[prefix + "meta"].tolist()))
            dtype = {str(d).removeprefix("torch."): d for d in FLOATS}[meta["dtype"]]
            n, k = map(int, meta["shape"])
            layout, group_size = str(meta["layout"]), int(meta["group_size"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{name} does not describe a sparse tensor: {error!r}") from error
        found = {part: state[prefix + part] for part in _COMPONENTS if prefix + part in state}
        if missing := {"values", "index"} - found.keys():
            raise CheckpointError(f"sparse tensor: {prefix}{min(missing)} is missing")
        check_index(prefix, found["index"], (n, k), layout)
        tensor = cls(layout, torch.Size((n, k)), dtype, group_size=group_size, **found)
        tensor.check(prefix)
        return tensor

    def check(self, prefix: str = "") -> None:
        """Raises CheckpointError unless every component has the shape and dtype of the layout."""
        check_index(prefix, self.index, tuple(self.shape), self.layout)
        n, k = self.shape
        kind = self.values.dtype
        if kind not in (*FLOATS, torch.int8, torch.uint8):
            _wrong(prefix, "values", "of a float dtype, int8 or uint8", kind)
        if self.layout == "2:4":
            kept = UNIT // 2 * ceil_div(k, UNIT)
            want = (n, kept // 2 if self.bits == 4 else kept)
        else:
            want = (int(self.row_start[-1]) // (2 if self.bits == 4 else 1),)
        if tuple(self.values.shape) != want:
            _wrong(prefix, "values", f"of shape {want}", tuple(self.values.shape))
        if (self.scale is None) != (kind in FLOATS):
            _wrong(prefix, "scale", "there for codes and absent for floats", f"{kind} values")
        if self.scale is None:
            return
        if self.group_size != -1 and (self.group_size < UNIT or self.group_size % UNIT):
            _wrong(prefix, "meta", f"-1 or a multiple of {UNIT} in group_size", self.group_size)
        groups = 1 if self.group_size == -1 else ceil_div(k, self.group_size)
        if tuple(self.scale.shape) != (n, groups) or self.scale.dtype not in FLOATS:
            got = f"{self.scale.dtype} {tuple(self.scale.shape)}"
            _wrong(prefix, "scale", f"of a float dtype and shape {(n, groups)}", got)

    def __repr__(self) -> str:
        share = self.nbytes / max(1, self.shape.numel() * self.dtype.itemsize)
        return (
            f"SparseTensor({self.layout!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"{self.bits}-bit values, {self.nbytes} bytes on {self.device}, {share:.3f} of dense)"
        )


def _wrong(prefix: str, part: str, want: str, got: object) -> None:
    raise CheckpointError(f"sparse tensor: {prefix}{part} must be {want}, got {got}")


def check_index(prefix: str, index: torch.Tensor, shape: tuple[int, int], layout: str) -> None:
    """Raises CheckpointError unless the index has its shape and says nothing impossible."""
    n, k = shape
    if layout not in LAYOUTS:
        _wrong(prefix, "meta", f"of layout {' or '.join(LAYOUTS)}", repr(layout))
    want = (n, ceil_div(k, UNIT))
    if tuple(index.shape) != want or index.dtype != torch.uint8:
        got = f"{index.dtype} {tuple(index.shape)}"
        _wrong(prefix, "index", f"uint8 of shape {want}", got)
    if layout == "2:4":
        for shift in (0, 4):
            low, high = index >> shift & 3, index >> shift + 2 & 3
            if not (low < high).all():
                _wrong(prefix, "index", "two rising columns for each group", "others")
    elif k % UNIT and n and int(index[:, -1].max()) >> k % UNIT:
        _wrong(prefix, "index", f"zero beyond column {k}", "bits that are set")


def row_starts(index: torch.Tensor, nibbles: bool) -> torch.Tensor:
    """Where each row's values begin, int64 (N + 1); rows of 4-bit codes begin with a byte."""
    bits = torch.tensor([byte.bit_count() for byte in range(256)], device=index.device)
    counts = bits[index.int()].sum(1)
    if nibbles:
        counts += counts % 2
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Source(NamedTuple):
    """What a layout packs: `codes` (N, K), floats or int8, and the parts of the result."""

    codes: torch.Tensor
    nibbles: bool
    dtype: torch.dtype
    parts: dict


def source(op: str, weight: torch.Tensor | QuantizedTensor) -> Source:
    """A dense matrix, or an int8 or symmetric int4 QuantizedTensor, ready to be packed.

    Raises:
        ValueError: another kind of weight, or NaN and infinity.
    """
    if isinstance(weight, QuantizedTensor):
        if weight.format not in ("int8", "int4") or weight.zero_point is not None:
            zeros = " with zero points" if weight.zero_point is not None else ""
            fail(op, "weight", "dense, int8 or symmetric int4", weight.format + zeros)
        if len(weight.shape) != 2:
            fail(op, "weight", "of shape (N, K)", f"shape {tuple(weight.shape)}")
        nibbles = weight.format == "int4"
        codes = weight.qdata
        if nibbles:
            codes = int4.unpack(codes, weight.shape[1]).to(torch.int8) - 8
        parts = {"scale": weight.scale, "group_size": weight.group_size}
        return Source(codes, nibbles, weight.dtype, parts)
    check_tensor(op, weight=weight)
    check_ndim(op, 2, "(N, K)", weight=weight)
    check_dtype(op, FLOATS, weight=weight)
    check_finite(weight)
    return Source(weight.detach(), False, weight.dtype, {})


def pad(tensor: torch.Tensor) -> torch.Tensor:
    """(N, K) with zero columns up to a multiple of UNIT."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % UNIT))


def pack_codes(codes: torch.Tensor, nibbles: bool) -> torch.Tensor:
    """Kept values as they are stored: 4-bit codes in pairs, the last axis even."""
    return int4.pack((codes + 8).to(torch.uint8)) if nibbles else codes


def unpack_codes(tensor: SparseTensor) -> torch.Tensor:
    """The inverse: floats, or codes as int8."""
    if tensor.bits != 4:
        return tensor.values
    stored = tensor.values
    return int4.unpack(stored, 2 * stored.shape[-1]).to(torch.int8) - 8
