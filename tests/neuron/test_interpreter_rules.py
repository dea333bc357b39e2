"""Each rule of the hardware, by a kernel that breaks it; the refusal names the kernel's line."""

import inspect
from pathlib import Path

import numpy as np
import pytest

from genai_perf.neuron.interpreter import KernelError, modules, simulate, target

MODULES = modules()
nl, nisa = MODULES["nki.language"], MODULES["nki.isa"]


def tile(*shape, dtype=None, buffer=None, value=0.0):
    t = nl.ndarray(shape, dtype=dtype or nl.float32, buffer=buffer or nl.sbuf)
    if value is not None and (buffer is nl.psum or t.buffer is nl.sbuf):
        nisa.memset(dst=t, value=int(value) if t.dtype.kind == "int" else value)
    return t


def psum(*shape, dtype=None):
    return tile(*shape, dtype=dtype, buffer=nl.psum, value=None)


def hbm(*shape, dtype=None):
    return nl.ndarray(shape, dtype=dtype or nl.float32, buffer=nl.shared_hbm)


def matmul(k=32, m=16, n=64, dst=None, x_type=None, y_type=None, **options):
    x, y = tile(k, m, dtype=x_type), tile(k, n, dtype=y_type)
    nisa.nc_matmul(dst=psum(m, n) if dst is None else dst, stationary=x, moving=y, **options)


def too_many_partitions():
    tile(129, 4)


def one_dimension_on_chip():
    nl.ndarray((128,), dtype=nl.float32, buffer=nl.sbuf)


def sbuf_overflow():
    held = [tile(128, 16384, value=None) for _ in range(4)]
    return held


def psum_overflow():
    held = [psum(128, 512) for _ in range(9)]
    return held


def start_partition():
    t = tile(128, 4)
    nisa.memset(dst=t[32:96], value=0.0)


def slice_out_of_bounds():
    tile(16, 4)[:, 2:5]


def pattern_out_of_bounds():
    tile(16, 4).ap([[4, 16], [1, 5]])


def pattern_strides_partitions():
    tile(16, 4).ap([[8, 8], [1, 4]])


def strided_partitions():
    tile(16, 4)[0:16:2]


def uninitialised_read():
    t = tile(16, 4, value=None)
    nisa.memset(dst=t[:, :2], value=0.0)
    nisa.tensor_copy(dst=tile(16, 4), src=t)


def uninitialised_integers():
    nisa.tensor_copy(dst=tile(16, 4), src=tile(16, 4, dtype=nl.int32, value=None))


def output_not_whole(out):
    nisa.dma_copy(dst=out[:2], src=tile(2, 4))
    return out


def output_in_private_hbm():
    return nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.private_hbm)


def dma_of_psum():
    matmul(dst=(p := psum(16, 64)))
    nisa.dma_copy(dst=hbm(16, 64), src=p)


def gpsimd_on_psum():
    p = psum(16, 8)
    nisa.memset(dst=p, value=0.0, engine=nisa.engine.gpsimd)


def select_from_psum():
    nisa.affine_select(dst=psum(16, 8), pattern=[[1, 8]], channel_multiplier=0,
                       on_true_tile=tile(16, 8), on_false_value=0.0)  # fmt: skip


def two_inputs_in_psum():
    x, y = psum(16, 64), psum(16, 64)
    matmul(dst=x)
    matmul(dst=y)
    nisa.tensor_tensor(dst=tile(16, 64), data1=x, data2=y, op=nl.add)


def matmul_into_sbuf():
    matmul(dst=tile(16, 64))


def matmul_of_integers():
    matmul(x_type=nl.int8, y_type=nl.int8)


def matmul_mixes_fp32():
    matmul(x_type=nl.float32, y_type=nl.bfloat16)


def matmul_into_bf16():
    matmul(dst=psum(16, 64, dtype=nl.bfloat16))


def matmul_of_e4m3fn():
    matmul(x_type=nl.float8_e4m3fn, y_type=nl.float8_e4m3fn)


def matmul_too_wide_moving():
    matmul(n=513, dst=psum(16, 513))


def matmul_too_wide_stationary():
    x, y = tile(32, 129), tile(32, 8)
    nisa.nc_matmul(dst=psum(128, 8), stationary=x, moving=y)


def matmul_over_two_banks():
    p = psum(16, 768)
    nisa.nc_matmul(dst=p[:, 256:768], stationary=tile(32, 16), moving=tile(32, 512))


def matmul_on_memset():
    p = psum(16, 64)
    nisa.memset(dst=p, value=0.0)
    matmul(dst=p, accumulate=True)


def matmul_adds_to_nothing():
    matmul(accumulate=True)


def matmul_shapes():
    matmul(dst=psum(16, 63))


def double_row_of_bf16():
    x, y = tile(32, 2, 8, dtype=nl.bfloat16), tile(32, 2, 8, dtype=nl.bfloat16)
    nisa.nc_matmul(dst=psum(8, 8), stationary=x, moving=y,
                   perf_mode=nisa.matmul_perf_mode.double_row)  # fmt: skip


def tile_position_alone():
    matmul(tile_position=(0, 0))


def tile_too_small():
    matmul(k=64, tile_position=(0, 0), tile_size=(32, 32))


def transpose_changes_type():
    nisa.nc_transpose(dst=psum(8, 16), data=tile(16, 8, dtype=nl.bfloat16))


def transpose_too_large_for_vector():
    nisa.nc_transpose(dst=tile(64, 32), data=tile(32, 64))


def shapes_differ():
    nisa.tensor_tensor(dst=tile(16, 8), data1=tile(16, 8), data2=tile(16, 4), op=nl.add)


def partitions_differ():
    nisa.tensor_copy(dst=tile(16, 8), src=tile(8, 8))


def operand_of_bf16():
    nisa.tensor_scalar(dst=tile(16, 8), data=tile(16, 8), op0=nl.add,
                       operand0=tile(16, 1, dtype=nl.bfloat16))  # fmt: skip


def mixed_kinds():
    t = tile(16, 8, dtype=nl.uint8)
    nisa.tensor_scalar(dst=t, data=t, op0=nl.bitwise_and, operand0=15, op1=nl.add, operand1=1)


def bits_of_floats():
    nisa.tensor_scalar(dst=tile(4, 4), data=tile(4, 4), op0=nl.bitwise_and, operand0=15)


def scalar_engine_maximum():
    t = tile(16, 8)
    nisa.tensor_scalar(dst=t, data=t, op0=nl.maximum, operand0=0.0, engine=nisa.engine.scalar)


def memset_literal():
    nisa.memset(dst=tile(4, 4, dtype=nl.int8, value=None), value=1.0)


def reduce_over_partitions():
    nisa.tensor_reduce(dst=tile(1, 4), op=nl.add, data=tile(16, 4), axis=0)


def reduce_of_a_middle_axis():
    nisa.tensor_reduce(dst=tile(16, 4), op=nl.add, data=tile(16, 3, 4), axis=1)


def activation_reduces_by_add():
    nisa.activation(dst=tile(4, 4), op=nl.exp, data=tile(4, 4), reduce_op=nl.maximum,
                    reduce_res=tile(4, 1))  # fmt: skip


def log_of_zero():
    nisa.activation(dst=tile(4, 4), op=nl.log, data=tile(4, 4))


def sin_of_ten():
    nisa.activation(dst=tile(4, 4), op=nl.sin, data=tile(4, 4, value=10.0))


def fp8_overflow():
    nisa.tensor_copy(dst=tile(4, 4, dtype=nl.float8_e4m3), src=tile(4, 4, value=300.0))


def nan_to_integer():
    nisa.tensor_copy(dst=tile(4, 4, dtype=nl.int8), src=tile(4, 4, value=float("nan")))


def predicate_of_floats():
    t = tile(4, 4)
    nisa.tensor_copy_predicated(dst=t, src=t, predicate=t)


def range_select_fills_zero():
    t, b = tile(4, 4), tile(4, 1)
    nisa.range_select(dst=t, on_true_tile=t, comp_op0=nl.less, comp_op1=nl.less, bound0=b,
                      bound1=b, on_false_value=0.0)  # fmt: skip


def stats_of_too_many():
    nisa.bn_stats(dst=tile(4, 6), data=tile(4, 513))


def gather_out_of_bounds():
    at = tile(4, 4, dtype=nl.uint32, value=9)
    nisa.nc_n_gather(dst=tile(4, 4), data=tile(4, 8), indices=at)


def dma_gather_out_of_bounds(out):
    at = tile(4, 1, dtype=nl.uint32, value=4)
    source = hbm(4, 4)
    nisa.dma_copy(dst=source, src=tile(4, 4))
    nisa.dma_copy(dst=tile(4, 4), src=source.ap([[4, 4], [1, 4]], vector_offset=at))


def hwdge_casts():
    nisa.dma_copy(dst=tile(4, 4), src=tile(4, 4, dtype=nl.bfloat16),
                  dge_mode=nisa.dge_mode.hwdge)  # fmt: skip


def transpose_shape():
    nisa.dma_transpose(dst=tile(4, 8), src=tile(4, 8), axes=(1, 0))


def branch_on_data():
    if tile(1, 1):
        pass


def dtype_by_name():
    nl.ndarray((4, 4), dtype="float32", buffer=nl.sbuf)


def operand_is_a_string():
    nisa.tensor_scalar(dst=tile(4, 4), data=tile(4, 4), op0="add", operand0=1.0)


BROKEN = {
    too_many_partitions: "1 to 128 partitions",
    one_dimension_on_chip: "two dimensions or more",
    sbuf_overflow: "SBUF is full",
    psum_overflow: "PSUM is full",
    start_partition: "64 partitions from 32; 64 can start at 0, 64 only",
    slice_out_of_bounds: "slice 2:5 leaves dimension 1",
    pattern_out_of_bounds: "leaves the 64 elements",
    pattern_strides_partitions: "step must be 4, got 8",
    strided_partitions: "partitions cannot be strided",
    uninitialised_read: r"read at \[0, 2\] before anything was written",
    uninitialised_integers: "before anything was written",
    dma_of_psum: "DMA cannot touch PSUM",
    gpsimd_on_psum: "GpSimd cannot reach PSUM",
    select_from_psum: "dst must be in sbuf",
    two_inputs_in_psum: "must not both be in PSUM",
    matmul_into_sbuf: "dst must be in psum",
    matmul_of_integers: "must be of a float type",
    matmul_mixes_fp32: "float32 goes with float32 only",
    matmul_into_bf16: "dst must be float32 on gen3",
    matmul_of_e4m3fn: "needs gen4",
    matmul_too_wide_moving: "513 columns, the limit is 512",
    matmul_too_wide_stationary: "129 columns, the limit is 128",
    matmul_over_two_banks: "more than one PSUM bank",
    matmul_on_memset: "adds to what a matmul wrote before",
    matmul_adds_to_nothing: "adds to what a matmul wrote before",
    matmul_shapes: r"must be \(16, 64\)",
    double_row_of_bf16: "double_row takes fp8",
    tile_position_alone: "given together",
    tile_too_small: "does not fit tile_size",
    transpose_changes_type: "must have the type of data",
    transpose_too_large_for_vector: "Vector transposes up to 32x32",
    shapes_differ: "must have the partitions and elements of dst",
    partitions_differ: "must have the partitions and elements of dst",
    operand_of_bf16: "must be float32",
    mixed_kinds: "must both be arithmetic or both bit operations",
    bits_of_floats: "takes integers",
    scalar_engine_maximum: "the Scalar engine does multiply, add",
    memset_literal: "int8 takes an int",
    reduce_over_partitions: "the last free dimensions",
    reduce_of_a_middle_axis: "the last free dimensions",
    activation_reduces_by_add: "reduces by nl.add",
    log_of_zero: "outside the device's range",
    sin_of_ten: "outside the device's range",
    fp8_overflow: "300 does not fit float8_e4m3",
    nan_to_integer: "NaN cast to int8",
    predicate_of_floats: "unsigned integers",
    range_select_fills_zero: "on_false_value must be",
    stats_of_too_many: "up to 512 elements",
    gather_out_of_bounds: "index 9 is outside the 8 elements",
    dma_gather_out_of_bounds: "index 4 lies outside",
    hwdge_casts: "hwdge does not cast",
    transpose_shape: r"must be of shape \(8, 4\)",
    branch_on_data: "cannot decide a branch",
    dtype_by_name: "named object nl.float32",
    operand_is_a_string: "must be an operator of nl",
    output_not_whole: r"never written at \[2, 0\]",
    output_in_private_hbm: "must be a tensor in nl.shared_hbm",
}


def run(body, generation="gen3"):
    takes_output = bool(inspect.signature(body).parameters)

    def kernel(x):
        return body(hbm(4, 4)) if takes_output else body()

    with target(generation):
        return simulate(kernel).run(np.zeros((1, 1), np.float32))


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: body.__name__)
def test_refused(body):
    with pytest.raises(KernelError, match=BROKEN[body]) as caught:
        run(body)
    # The line is one of this file (results are checked after the kernel has ended).
    if not body.__name__.startswith("output_"):
        assert str(caught.value).startswith(f"{Path(__file__).name}:")


def test_line_of_the_kernel():
    with pytest.raises(KernelError) as caught:
        run(start_partition)
    line = inspect.getsourcelines(start_partition)[1] + 2
    assert f"{Path(__file__).name}:{line} in start_partition: memset" in str(caught.value)
