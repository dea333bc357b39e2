"""What a kernel finds under `nki.language`."""

from types import ModuleType

from . import convenience, dtypes
from .alu import ACTIVATIONS, OPS, UNARY, Activation
from .errors import kernel_frame, refuse
from .machine import current
from .memory import HBM, PRIVATE_HBM, PSUM, SBUF, SHARED_HBM
from .targets import PARTITIONS
from .tensor import Tensor, ds


class NKIObject:
    """Base of the plain objects that kernels pass around."""


class tile_size:
    """The limits of a tile, some of them of the target."""

    pmax = gemm_stationary_fmax = PARTITIONS
    gemm_moving_fmax = psum_bank_fmax = psum_fmax = bn_stats_fmax = 512
    psum_bank_fmax_bytes = 2048
    psum_min_align = sbuf_min_align = 4

    @property
    def psum_num_banks(self) -> int:
        return current().target.psum_banks

    @property
    def sbuf_fmax_bytes(self) -> int:
        return current().target.sbuf_bytes

    total_available_sbuf_size = sbuf_fmax = sbuf_fmax_bytes

    @property
    def sbuf_size_bytes(self) -> int:
        return PARTITIONS * current().target.sbuf_bytes


def ndarray(shape, dtype, buffer=SBUF, name="", address=None) -> Tensor:
    """An uninitialised tensor."""
    return current().allocate(shape, dtype, buffer, name, address)


def program_id(axis: int = 0) -> int:
    return current().program_id if axis == 0 else 0


def num_programs(axes=None) -> int:
    return current().num_programs


def program_ndim() -> int:
    return 1


def fori_loop(lower, upper, body, step=1) -> None:
    """A loop on the device: the body sees its index only as a scalar_offset."""
    for i in range(lower, upper, step):
        body(i)


class no_reorder:
    """`with nl.no_reorder():` instructions run in program order, as they do here anyway."""

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        pass


def device_print(tag: str, x: Tensor) -> None:
    frame = kernel_frame()
    where = "" if frame is None else f" (line {frame.f_lineno})"
    print(f"{tag}{where}: {x!r}\n{x.data}")


def static_assert(condition, message="") -> None:
    if not condition:
        refuse(message)


def _namespace() -> dict:
    names = {dtype.name: dtype for dtype in dtypes.ALL}
    names |= ACTIVATIONS | OPS
    # `nl.abs` is an operator of tensor_scalar and an activation; both read it from its name.
    names |= {n: Activation(n, UNARY[n]) for n in UNARY if n not in ACTIVATIONS}
    names |= convenience.reduction_functions()
    names |= {
        "sbuf": SBUF, "psum": PSUM, "hbm": HBM, "private_hbm": PRIVATE_HBM,
        "shared_hbm": SHARED_HBM, "ds": ds, "ndarray": ndarray, "tile_size": tile_size(),
        "program_id": program_id, "num_programs": num_programs, "program_ndim": program_ndim,
        "affine_range": range, "sequential_range": range, "static_range": range,
        "fori_loop": fori_loop, "no_reorder": no_reorder, "device_print": device_print,
        "static_assert": static_assert, "NKIObject": NKIObject, "NkiTensor": Tensor,
        "load": convenience.load, "store": convenience.store_to,
        "mean": convenience.mean, "softmax": convenience.softmax, "matmul": convenience.matmul,
        "transpose": convenience.transpose, "where": convenience.where,
        "broadcast_to": convenience.broadcast_to, "zeros": convenience.filled(0.0),
        "ones": convenience.filled(1.0), "full": convenience.full,
        "zeros_like": convenience.zeros_like, "empty_like": convenience.empty_like,
        "shared_identity_matrix": convenience.shared_identity_matrix,
        "shared_constant": convenience.shared_constant,
        "fp32": dtypes.float32,
    }  # fmt: skip
    return names


def module() -> ModuleType:
    found = ModuleType("nki.language", __doc__)
    vars(found).update(_namespace())
    return found
