"""The data types of NKI, and the casts that engines do on the way in and out."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import refuse


@dataclass(frozen=True, eq=False)
class DType:
    """A named type: `store` is what NumPy holds it in, `kind` is "float", "int" or "packed"."""

    name: str
    store: np.dtype
    kind: str
    max: float = 0.0

    @property
    def itemsize(self) -> int:
        return self.store.itemsize

    @property
    def dtype(self) -> np.dtype:
        """NumPy's: `x.astype(nl.bfloat16)` works."""
        return self.store

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


def _float(name: str, store, largest: float) -> DType:
    return DType(name, np.dtype(store), "float", largest)


def _int(name: str) -> DType:
    return DType(name, np.dtype(name), "int", float(np.iinfo(name).max))


float32 = _float("float32", np.float32, 3.4028234663852886e38)
tfloat32 = _float("tfloat32", np.float32, 3.4011621342146535e38)
bfloat16 = _float("bfloat16", ml_dtypes.bfloat16, 3.3895313892515355e38)
float16 = _float("float16", np.float16, 65504.0)
float8_e4m3 = _float("float8_e4m3", ml_dtypes.float8_e4m3, 240.0)
float8_e5m2 = _float("float8_e5m2", ml_dtypes.float8_e5m2, 57344.0)
float8_e4m3fn = _float("float8_e4m3fn", ml_dtypes.float8_e4m3fn, 448.0)
float8_e8m0fnu = _float("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, 2.0**127)
int8, int16, int32 = _int("int8"), _int("int16"), _int("int32")
uint8, uint16, uint32 = _int("uint8"), _int("uint16"), _int("uint32")
bool_ = DType("bool_", np.dtype(np.uint8), "int", 255.0)
# Four elements of gen4's MX formats in one; no instruction here computes with them.
PACKED = (
    DType("float8_e4m3fn_x4", np.dtype(np.uint32), "packed"),
    DType("float8_e5m2_x4", np.dtype(np.uint32), "packed"),
    DType("float4_e2m1fn_x4", np.dtype(np.uint16), "packed"),
)

ALL = (float32, tfloat32, bfloat16, float16, float8_e4m3, float8_e5m2, float8_e4m3fn,
       float8_e8m0fnu, int8, int16, int32, uint8, uint16, uint32, bool_, *PACKED)  # fmt: skip
FP8 = (float8_e4m3, float8_e5m2, float8_e4m3fn)
_BY_STORE = {d.store: d for d in ALL if d not in (tfloat32, bool_, *PACKED)}
_BY_NAME = {d.name: d for d in ALL}
MASK = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of(array: np.ndarray) -> DType:
    """The type of a NumPy array that a kernel is called with."""
    if array.dtype == np.bool_:
        return bool_
    if array.dtype not in _BY_STORE:
        refuse(f"no NKI type holds NumPy's {array.dtype}")
    return _BY_STORE[array.dtype]


def resolve(dtype) -> DType:
    """A DType from what a kernel wrote: one of ours, or NumPy's name of it."""
    if isinstance(dtype, DType):
        return dtype
    if isinstance(dtype, str) and dtype in _BY_NAME:
        refuse(f"dtype must be the named object nl.{dtype}, got the string {dtype!r}")
    try:
        return _BY_STORE[np.dtype(dtype)]
    except (TypeError, KeyError):
        refuse(f"dtype must be one of nl's types, got {dtype!r}")


def _not_packed(dtype: DType) -> None:
    if dtype in PACKED:
        refuse(f"{dtype}: gen4's MX types can be moved and set to 0 here, nothing else")


def to_float(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Values as an engine sees them: fp32."""
    _not_packed(dtype)
    return values if values.dtype == np.float32 else values.astype(np.float32)


def round_tf32(values: np.ndarray) -> np.ndarray:
    """To nearest even in 10 bits of mantissa."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def from_float(values: np.ndarray, dtype: DType) -> np.ndarray:
    """fp32 written as `dtype`: to nearest even; integers saturate; fp8 must not overflow."""
    _not_packed(dtype)
    if dtype is float32:
        return values
    if dtype is tfloat32:
        return round_tf32(values)
    if dtype.kind == "int":
        return _to_int(values, dtype)
    result = values.astype(dtype.store)
    if dtype in FP8:
        kept = np.isfinite(result.astype(np.float32))
        over = ~kept & ~np.isnan(values)
        if over.any():
            refuse(f"{values[over].flat[0]:g} does not fit {dtype} (largest {dtype.max:g}): it "
                   "becomes inf or NaN on the device; clamp before the cast")  # fmt: skip
    return result


def _to_int(values: np.ndarray, dtype: DType) -> np.ndarray:
    if np.isnan(values).any():
        refuse(f"NaN cast to {dtype}: the result is not specified")
    info = np.iinfo(dtype.store)
    if info.max < 2**24:
        return np.clip(np.rint(values), info.min, info.max).astype(dtype.store)
    exact = np.rint(values).astype(np.float64)
    return np.clip(exact, info.min, info.max).astype(dtype.store)
