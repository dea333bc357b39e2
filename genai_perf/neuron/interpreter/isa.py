"""What a kernel finds under `nki.isa`."""

from types import ModuleType

from . import cores, dma, gpsimd_engine, scalar_engine, tensor_engine, vector_engine, vector_reduce
from .enums import dge_mode, engine, matmul_perf_mode, oob_mode, reduce_cmd
from .machine import current
from .targets import nc_version
from .tensor import Tensor


class Register:
    """A number that the device holds; kernels may only pass it on."""

    def __init__(self, value: int = 0):
        self.value = int(value)

    def __index__(self) -> int:
        return self.value

    def __int__(self) -> int:
        return self.value


def register_alloc(x=None) -> Register:
    return Register(0 if x is None else x)


def register_load(register: Register, tile: Tensor) -> None:
    register.value = int(tile.item())


def register_store(tile: Tensor, register: Register) -> None:
    vector_engine.memset(tile, int(register))


def register_move(dst: Register, src) -> None:
    dst.value = int(src)


def get_nc_version():
    return current().target.generation


_FUNCTIONS = (
    tensor_engine.nc_matmul, tensor_engine.nc_transpose, vector_engine.tensor_tensor,
    vector_engine.tensor_scalar, vector_engine.scalar_tensor_tensor, vector_engine.tensor_copy,
    vector_engine.memset, vector_engine.tensor_reduce, vector_engine.tensor_tensor_scan,
    vector_reduce.tensor_scalar_reduce, vector_reduce.range_select, vector_reduce.select_reduce,
    vector_engine.tensor_copy_predicated, vector_engine.reciprocal,
    vector_reduce.tensor_scalar_cumulative, scalar_engine.activation_reduce,
    scalar_engine.exponential, gpsimd_engine.iota, gpsimd_engine.affine_select,
    gpsimd_engine.tensor_partition_reduce, gpsimd_engine.nc_n_gather, gpsimd_engine.local_gather,
    gpsimd_engine.nc_stream_shuffle, gpsimd_engine.bn_stats, gpsimd_engine.bn_aggr,
    gpsimd_engine.max8, gpsimd_engine.nc_find_index8, gpsimd_engine.nc_match_replace8,
    gpsimd_engine.nonzero_with_count,
    dma.dma_copy, dma.dma_transpose, dma.dma_compute, register_alloc, register_load,
    register_store, register_move, get_nc_version, cores.core_barrier,
    cores.sendrecv,
)  # fmt: skip


def modules() -> dict[str, ModuleType]:
    """`nki.isa` and `nki.isa.constants`."""
    isa, constants = ModuleType("nki.isa", __doc__), ModuleType("nki.isa.constants")
    enums = {
        "engine": engine, "matmul_perf_mode": matmul_perf_mode, "reduce_cmd": reduce_cmd,
        "oob_mode": oob_mode, "dge_mode": dge_mode, "nc_version": nc_version,
    }  # fmt: skip
    vars(constants).update(enums)
    vars(isa).update({f.__name__: f for f in _FUNCTIONS})
    vars(isa).update(enums)
    vars(isa).update(
        activation=scalar_engine.activation_, constants=constants,
        **{f"{name}_engine": getattr(engine, name)
           for name in ("tensor", "vector", "scalar", "gpsimd", "sync", "unknown")},
    )  # fmt: skip
    return {"nki.isa": isa, "nki.isa.constants": constants}
