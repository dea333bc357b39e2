"""QuantizedTensor, and what every format says about itself: its options, its layout, its codec."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch

from .._checks import check_choice, check_dtype, check_tensor, fail
from .._errors import CheckpointError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COMPONENTS = ("qdata", "scale", "zero_point", "nested_scale", "scale_offset")
# A scale is never below the smallest normal number, so that x / scale stays finite.
SCALE_FLOOR = torch.finfo(torch.float32).tiny

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Spec(NamedTuple):
    """Resolved options of one quantization: what `Format.spec` makes of the user's keywords."""

    group_size: int = -1
    double_quant: bool = False
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    allow_nonfinite: bool = False


class Components:
    """What a dataclass of tensors and how to read them says of those tensors."""

    parts: ClassVar[tuple[str, ...]]

    def components(self) -> dict[str, torch.Tensor]:
        """The stored tensors that are there, by field name."""
        fields = {name: getattr(self, name) for name in self.parts}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        return getattr(self, self.parts[0]).device

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(tensor.nbytes for tensor in self.components().values())


@dataclass(eq=False)
class QuantizedTensor(Components):
    """A quantized tensor: a few plain tensors and how to read them.

    Dequantized: `(qdata - zero_point) * scale`, with `qdata` looked up in the book for nf4 and fp4.

    Attributes:
        format: a name of `genai_perf.formats.FORMATS`.
        shape: logical shape, (N, K) = (out_features, in_features) for a weight.
        dtype: what `dequantize()` gives when not told otherwise.
        qdata: codes, in the layout of the format.
        scale: one a row, group or block; uint8 codes of the dynamic map when double-quantized.
        zero_point: unsigned codes, asymmetric formats only.
        group_size: elements that share a scale along a row (-1: the whole row).
        nested_scale: fp32, one for 256 scales, double quantization only.
        scale_offset: fp32 scalar, the mean of the scales, double quantization only.
        packed: what a backend made of the components for its next call; not part of the value.
    """

    format: str
    shape: torch.Size
    dtype: torch.dtype
    qdata: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    group_size: int = -1
    nested_scale: torch.Tensor | None = None
    scale_offset: torch.Tensor | None = None
    packed: object | None = field(default=None, init=False, repr=False)
    parts = COMPONENTS

    @property
    def spec(self) -> Spec:
        """The options that this tensor was made with, as far as its components show them."""
        nested = self.nested_scale is not None
        scale_dtype = torch.float32 if nested else self.scale.dtype
        return Spec(self.group_size, nested, self.zero_point is None, scale_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor it stands for, by the reference codec: fp32, rounded once to `dtype`."""
        from . import get

        return get(self.format).dequantize(self, dtype)

    @property
    def by_rows(self) -> bool:
        """Whether each row of this (N, K) has its own codes and scales, as `rows` needs."""
        return len(self.shape) == 2 and all(
            tensor.dim() == 2 and len(tensor) == self.shape[0]
            for tensor in self.components().values()
        )

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Rows start to stop of one that is `by_rows`; the components are views."""
        parts = {name: tensor[start:stop] for name, tensor in self.components().items()}
        shape = torch.Size((len(parts["qdata"]), self.shape[1]))
        return QuantizedTensor(self.format, shape, self.dtype, group_size=self.group_size, **parts)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.components().items()}
        return QuantizedTensor(self.format, self.shape, self.dtype,
                               group_size=self.group_size, **moved)  # fmt: skip

    def own(self) -> "QuantizedTensor":
        """The same tensor in memory of its own, aligned: not a view of a mapped file."""
        return replace(self, **{name: t.clone() for name, t in self.components().items()})

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Plain tensors that `from_state_dict` reads back: the components and `<prefix>meta`.

        `meta` is JSON as uint8, so that the whole survives safetensors and `nn.Module` buffers.
        """
        meta = {
            "format": self.format,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "group_size": self.group_size,
        }
        state = {prefix + name: tensor for name, tensor in self.components().items()}
        state[prefix + "meta"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], prefix: str = ""
    ) -> "QuantizedTensor":
        """Reads what `state_dict(prefix)` wrote, and checks it; other keys are left alone.

        Raises:
            CheckpointError: a component is missing or has another shape or dtype than its format
                and meta say.
        """
        meta = _read_meta(state, prefix)
        found = {name: state[prefix + name] for name in COMPONENTS if prefix + name in state}
        for name in ("qdata", "scale"):
            if name not in found:
                raise CheckpointError(f"quantized tensor: {prefix}{name} is missing")
        tensor = cls(**meta, **found)
        tensor.check(prefix)
        return tensor

    def check(self, prefix: str = "") -> None:
        """Raises CheckpointError unless every component has the shape and dtype of its format."""
        from . import get

        try:
            layout = get(self.format).layout(self.shape, self.spec)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"quantized tensor {prefix or '(no prefix)'}: {error}") from error
        components = self.components()
        for name in layout.keys() | components.keys():
            want, tensor = layout.get(name), components.get(name)
            got = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if want != got:
                raise CheckpointError(f"quantized tensor: {prefix}{name} must be "
                                      f"{_describe(want)}, got {_describe(got)}")  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.format!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"group_size={self.group_size}, {', '.join(self.components())}, "
            f"{self.nbytes} bytes on {self.device})"
        )


def _describe(component: tuple | None) -> str:
    return "absent" if component is None else f"{component[1]} {component[0]}"


def _read_meta(state: Mapping[str, torch.Tensor], prefix: str) -> dict:
    name = f"quantized tensor: {prefix}meta"
    if prefix + "meta" not in state:
        raise CheckpointError(f"{name} is missing")
    try:
        meta = json.loads(bytes(state[prefix + "meta"].tolist()))
        return {
            "format": str(meta["format"]),
            "shape": torch.Size(meta["shape"]),
            "dtype": {str(d).removeprefix("torch."): d for d in FLOATS}[meta["dtype"]],
            "group_size": int(meta["group_size"]),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name} does not describe a quantized tensor: {error!r}") from error


class Format(ABC):
    """One quantization format: a name, its options, the layout of its components, its codec."""

    name: str
    # The keywords of `quantize` that mean something here; any other one is refused.
    options: tuple[str, ...] = ()

    @abstractmethod
    def _resolve(self, **options) -> Spec:
        """Checks the format's own options and fills in its defaults."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...], spec: Spec) -> Layout:
        """Shape and dtype of each component of a tensor of `shape`."""

    @abstractmethod
    def encode(self, x: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
        """Components of `x`, an fp32 tensor with at least one dimension, all finite unless
        `spec.allow_nonfinite`."""

    @abstractmethod
    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        """The fp32 tensor that `qt` stands for."""

    def spec(self, *, group_size: int | None = None, double_quant: bool = False,
             symmetric: bool = True, granularity: str | None = None,
             scale_dtype: torch.dtype | None = None,
             allow_nonfinite: bool = False) -> Spec:  # fmt: skip
        """The options of `quantize`, checked; one that means nothing to this format is refused."""
        given = {"group_size": group_size, "granularity": granularity, "scale_dtype": scale_dtype}
        given = {name: value for name, value in given.items() if value is not None}
        switches = {"double_quant": (double_quant, False), "symmetric": (symmetric, True),
                    "allow_nonfinite": (allow_nonfinite, False)}  # fmt: skip
        given |= {name: value for name, (value, default) in switches.items() if value != default}
        for name, value in given.items():
            if name not in self.options and not (name == "group_size" and value == -1):
                fail("quantize", name, f"left out with format {self.name!r} (it takes "
                     f"{', '.join(self.options) or 'no options'})", repr(value))  # fmt: skip
        return self._resolve(**{k: v for k, v in given.items() if k in self.options})

    def quantize(self, x: torch.Tensor, *, group_size: int | None = None,
                 double_quant: bool = False, symmetric: bool = True,
                 granularity: str | None = None, scale_dtype: torch.dtype | None = None,
                 allow_nonfinite: bool = False) -> QuantizedTensor:  # fmt: skip
        """`x` in this format, by the reference codec; options as in `genai_perf.quantize`."""
        spec = self.spec(group_size=group_size, double_quant=double_quant, symmetric=symmetric,
                         granularity=granularity, scale_dtype=scale_dtype,
                         allow_nonfinite=allow_nonfinite)  # fmt: skip
        check_input(x)
        x = x.detach()
        if not spec.allow_nonfinite:
            check_finite(x)
        return self.assemble(self.encode(x.float(), spec), x, spec)

    def dequantize(self, qt: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor that `qt` stands for, rounded once from fp32 to `dtype` (`qt.dtype`)."""
        dtype = dtype or qt.dtype
        check_choice("dequantize", "dtype", dtype, FLOATS)
        return self.decode(qt).to(dtype)

    def assemble(self, components: dict, x: torch.Tensor, spec: Spec) -> QuantizedTensor:
        return QuantizedTensor(self.name, x.shape, x.dtype,
                               group_size=spec.group_size, **components)  # fmt: skip


def from_parts(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype) -> QuantizedTensor:  # fmt: skip
    """A QuantizedTensor of what an op's schema passes; fp8 codes may come as bytes."""
    from . import get

    qt = QuantizedTensor(format, torch.Size(shape), dtype, qdata, scale, zero_point, group_size,
                         nested_scale, scale_offset)  # fmt: skip
    if qdata.dtype is torch.uint8:
        qt.qdata = qdata.view(get(format).layout(qt.shape, qt.spec)["qdata"][1])
    return qt


def check_input(x: torch.Tensor) -> None:
    check_tensor("quantize", x=x)
    check_dtype("quantize", FLOATS, x=x)
    if x.dim() == 0:
        fail("quantize", "x", "of at least one dimension", "a scalar")


def check_finite(x: torch.Tensor) -> None:
    """Raises ValueError that names the first inf or NaN of `x` and where it stands."""
    finite = torch.isfinite(x)
    if not finite.all():
        refuse_nonfinite(x, int((~finite).reshape(-1).int().argmax()))


def refuse_nonfinite(x: torch.Tensor, flat: int) -> None:
    at, rest = [], flat
    for size in reversed(x.shape):
        at.insert(0, rest % size)
        rest //= size
    fail("quantize", "x", "finite", f"{x[tuple(at)].item()} at {tuple(at)}")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
