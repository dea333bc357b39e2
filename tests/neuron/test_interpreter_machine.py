"""What differs between the generations, memory and meters, launches on one core and two."""

import ml_dtypes
import numpy as np
import pytest
from test_interpreter_rules import (
    hbm,
    matmul,
    matmul_of_e4m3fn,
    nisa,
    nl,
    psum,
    run,
    tile,
    too_many_partitions,
)

from genai_perf.neuron.interpreter import KernelError, simulate, target


def range_select():
    t, b = tile(4, 4), tile(4, 1)
    nisa.range_select(dst=t, on_true_tile=t, comp_op0=nl.less, comp_op1=nl.less, bound0=b, bound1=b)


def number_as_bias():
    nisa.activation(dst=tile(4, 4), op=nl.exp, data=tile(4, 4), bias=1.0)


def copy_on_scalar():
    nisa.tensor_copy(dst=tile(4, 4), src=tile(4, 4), engine=nisa.engine.scalar)


def exponential():
    nisa.exponential(dst=tile(4, 4), src=tile(4, 4))


def bf16_matmul_result():
    matmul(dst=psum(16, 64, dtype=nl.bfloat16))


@pytest.mark.parametrize("body, since", (
    (range_select, 3), (number_as_bias, 3), (copy_on_scalar, 3), (exponential, 4),
    (matmul_of_e4m3fn, 4), (bf16_matmul_result, 4),
))  # fmt: skip
def test_generations(body, since):
    for generation in (2, 3, 4):
        if generation < since:
            with pytest.raises(KernelError):
                run(body, f"gen{generation}")
        else:
            run(body, f"gen{generation}")


def test_sbuf_sizes_of_the_generations():
    def fill(kib):
        def body():
            tile(128, kib * 256, value=None)

        return body

    for generation, kib in (("gen2", 176), ("gen3", 208), ("gen4", 240)):
        run(fill(kib), generation)
        with pytest.raises(KernelError, match="SBUF is full"):
            run(fill(kib + 1), generation)


def test_tiles_that_nothing_holds_are_free_again():
    def many():
        for _ in range(50):
            tile(128, 16384)
            psum(128, 1024)

    report = run(many).report
    assert report.sbuf_peak <= 2 * 65536 and report.psum_peak <= 2 * 4096


def test_meter():
    def body():
        x, y = tile(128, 128, dtype=nl.bfloat16), tile(128, 512, dtype=nl.bfloat16)
        p, out = psum(128, 512), tile(128, 512, dtype=nl.bfloat16)
        nisa.nc_matmul(dst=p, stationary=x, moving=y)
        nisa.activation(dst=out, op=nl.exp, data=p)
        nisa.dma_copy(dst=hbm(128, 512, dtype=nl.bfloat16), src=out)

    report = run(body).report
    assert report.by_instruction["tensor", "nc_matmul"] == (1, 512)
    assert report.by_instruction["scalar", "activation"] == (1, 512)
    assert report.flops == 2 * 128 * 128 * 512
    assert report.hbm_written == 128 * 512 * 2 and report.hbm_read == 0
    assert report.engines["tensor"].seconds == pytest.approx(512 / 2.4e9)
    assert report.engines["dma"].seconds == pytest.approx(128 * 1024 / 362e9)


def test_an_estimate_counts_the_same_and_computes_nothing():
    def kernel(x):
        out, t = hbm(64, 64), nl.ndarray((64, 64), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=t, src=x)
        nisa.activation(dst=t, op=nl.log, data=t)
        nisa.dma_copy(dst=out, src=t)
        return out

    x = np.ones((64, 64), np.float32)
    counted = simulate(kernel).run(x).report
    assert simulate(kernel).estimate(np.empty_like(x)) == counted


def test_outside_a_kernel():
    with pytest.raises(KernelError, match="inside a kernel"):
        nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.sbuf)


def test_arguments():
    with pytest.raises(ValueError, match="target must be one of gen2, gen3, gen4"), target("trn9"):
        pass
    with pytest.raises(KernelError, match="no NKI type holds NumPy's float64"):
        simulate(lambda x: x)(np.zeros((2, 2)))
    with pytest.raises(KernelError, match="1 or 2 cores"):
        simulate(lambda x: x)[3]
    assert ml_dtypes.float8_e4m3(240) == 240


def test_second_core_fails():
    def kernel(x):
        if nl.program_id(0) == 1:
            too_many_partitions()
        nisa.core_barrier()

    with pytest.raises(KernelError, match="1 to 128 partitions"):
        simulate(kernel)[2](np.zeros((1, 1), np.float32))


def test_barrier_that_one_core_misses():
    def kernel(x):
        if nl.program_id(0) == 0:
            nisa.core_barrier()

    with pytest.raises(KernelError, match="ended without arriving"):
        simulate(kernel)[2](np.zeros((1, 1), np.float32))


def test_a_tensor_that_the_caller_gave_may_be_written_and_returned():
    def kernel(x, out):
        t = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=t, src=x)
        nisa.dma_copy(dst=out, src=t)
        return out

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (simulate(kernel)(x, np.zeros_like(x)) == x).all()
