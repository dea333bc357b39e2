"""Lanes that nobody wrote, what two cores exchange, and views that public kernels use."""

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")
import ml_dtypes

from genai_perf.neuron.interpreter import KernelError, simulate

F32 = np.float32


@pytest.fixture
def half_written(nl, nisa):
    """(8, 8) fp32 in SBUF, of which columns 0 to 3 are 7."""

    def make():
        t = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=t[:, 0:4], value=7.0)
        return t

    return make


@pytest.fixture
def mover(nl, nisa):
    """mover(way)(dst in PSUM, src, identity): dst = src^T."""

    def by_matmul(dst, src, eye):
        nisa.nc_matmul(dst=dst, stationary=src, moving=eye, is_transpose=True)

    def by_transpose(dst, src, eye):
        nisa.nc_transpose(dst=dst, data=src, engine=nisa.engine.tensor)

    return {"matmul": by_matmul, "transpose": by_transpose}.__getitem__


@pytest.mark.parametrize("way", ["matmul", "transpose"])
def test_lanes_that_nobody_wrote_are_moved_along(on, nl, nisa, half_written, mover, way):
    def body(eye):
        turned = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.psum)
        mover(way)(turned, half_written(), eye)
        held = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=held, src=turned)
        return held[0:4]

    assert (on(body, np.eye(8, dtype=F32)) == 7).all()


@pytest.mark.parametrize("way", ["matmul", "transpose"])
def test_and_stay_unwritten(on, nl, nisa, half_written, mover, way):
    def body(eye):
        turned = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.psum)
        mover(way)(turned, half_written(), eye)
        held = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=held, data=turned, op0=nl.add, operand0=1.0)
        return held

    with pytest.raises(KernelError, match=r"read at \[4, 0\] before anything was written"):
        on(body, np.eye(8, dtype=F32))


def test_gen2_multiplies_what_it_transposes(on, nl, half_written, mover):
    def body(eye):
        turned = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.psum)
        mover("matmul")(turned, half_written(), eye)
        return turned

    with pytest.raises(KernelError, match="before anything was written"):
        on(body, np.eye(8, dtype=F32), generation="gen2")


def test_shuffle_keeps_what_was_there(on, nl, nisa):
    def body(x):
        t = nl.ndarray((32, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=t[0:1], src=x[0:1])
        nisa.nc_stream_shuffle(dst=t, src=t, shuffle_mask=[255, 0] + [255] * 30)
        return t[0:2] if whole else t

    x = np.arange(128, dtype=F32).reshape(32, 4)
    whole = True
    assert (on(body, x) == x[[0, 0]]).all()
    whole = False
    with pytest.raises(KernelError, match=r"read at \[2, 0\] before anything was written"):
        on(body, x)


def test_nonzero_with_count(on, nl, nisa, rng):
    def body(x):
        found = nl.ndarray((128, 13), dtype=nl.int32, buffer=nl.sbuf)
        nisa.memset(dst=found, value=-7)
        nisa.nonzero_with_count(dst=found, src=x, index_offset=100, padding_val=-1)
        return found

    x = (rng.random((128, 12)) < 0.4).astype(F32)
    x[16] = 0
    got = on(body, x)
    for p in range(128):
        at = np.flatnonzero(x[p]) + 100
        if p % 16:
            assert (got[p] == -7).all()
        else:
            assert (got[p, : at.size] == at).all() and (got[p, at.size : -1] == -1).all()
            assert got[p, -1] == at.size
    with pytest.raises(KernelError, match="needs gen3"):
        on(body, x, generation="gen2")


def test_nonzero_with_count_needs_room_for_the_count(on, nl, nisa):
    def body(x):
        found = nl.ndarray((16, 4), dtype=nl.int32, buffer=nl.sbuf)
        nisa.nonzero_with_count(dst=found, src=x)
        return found

    with pytest.raises(KernelError, match="one element a partition more"):
        on(body, np.ones((16, 4), F32))


def exchange(nl, nisa, pipes=(0, 0), to=None):
    def kernel(x):
        core = nl.program_id(0)
        out = nl.ndarray((2, 2, 4), dtype=nl.float32, buffer=nl.shared_hbm)
        mine = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=mine, src=x[core : core + 1])
        for i in range(2):  # there, and back
            got = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf)
            peer = 1 - core if to is None else to
            nisa.sendrecv(src=mine, dst=got, send_to_rank=peer, recv_from_rank=peer,
                          pipe_id=pipes[core])  # fmt: skip
            nisa.dma_copy(dst=out[core, i : i + 1], src=got)
            mine = got
        return out

    return simulate(kernel)


def test_sendrecv(nl, nisa):
    x = np.arange(8, dtype=F32).reshape(2, 4)
    run = exchange(nl, nisa)[2].run(x)
    assert (run.outputs == np.stack([x[[1, 0]], x[[0, 1]]])).all()
    dry = exchange(nl, nisa)[2].estimate(x)
    assert dry == run.report


@pytest.mark.parametrize(
    ("cores", "options", "said"),
    [
        (2, {"pipes": (0, 1)}, "sends no"),
        (2, {"to": 0}, "core 0 exchanges with 1, got 0 and 0"),
        (1, {}, "not launched on two cores"),
    ],
)
def test_sendrecv_refused(nl, nisa, cores, options, said):
    with pytest.raises(KernelError, match=said):
        exchange(nl, nisa, **options)[cores](np.zeros((2, 4), F32))


def test_sendrecv_meets_a_barrier(nl, nisa):
    def kernel(x):
        t = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=t, value=0.0)
        if nl.program_id(0) == 0:
            nisa.core_barrier()
        else:
            nisa.sendrecv(src=t, dst=t, send_to_rank=0, recv_from_rank=0, pipe_id=0)

    with pytest.raises(KernelError, match="at a core_barrier, not at a sendrecv"):
        simulate(kernel)[2](np.zeros((1, 1), F32))


def test_offsets_count_in_strides_of_the_view(nki, nl, nisa):
    @nki.jit
    def kernel(x, at):
        index = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=index, src=at)
        out = nl.ndarray((1, 3), dtype=nl.float32, buffer=nl.shared_hbm)
        row = x.reshape((1, 8))
        nisa.dma_copy(dst=out, src=row.ap([[8, 1], [1, 3]], scalar_offset=index, indirect_dim=1))
        return out

    x = np.arange(8, dtype=F32)
    assert (kernel(x, np.array([[4]], np.int32)) == x[4:7]).all()


def test_a_broadcast_of_psum_repeats_its_elements(on, nl, nisa, rng):
    def body(x):
        means = nl.ndarray((4, 40), dtype=nl.float32, buffer=nl.psum)
        nisa.tensor_copy(dst=means, src=x[:, 0:40])
        out = nl.ndarray((4, 40, 128), dtype=nl.float32, buffer=nl.sbuf)
        many = means.expand_dim(2).broadcast(2, 128)  # 5120 elements, 40 of its own
        nisa.tensor_tensor(dst=out, data1=x.reshape((4, 40, 128)), data2=many, op=nl.add)
        return out

    x = rng.standard_normal((4, 5120)).astype(F32)
    assert (on(body, x) == x.reshape(4, 40, 128) + x[:, :40, None]).all()


def test_range_select_fills_with_the_least_number_however_written(on, nl, nisa):
    def body(x, low, high):
        out = nl.ndarray((4, 6), dtype=nl.float32, buffer=nl.sbuf)
        nisa.range_select(dst=out, on_true_tile=x, comp_op0=nl.greater_equal, comp_op1=nl.less,
                          bound0=low, bound1=high, on_false_value=-3.4028235e38)  # fmt: skip
        return out

    ones, at = np.ones((4, 1), F32), np.arange(6)
    got = on(body, np.ones((4, 6), F32), ones, 4 * ones)
    assert (got == np.where((at >= 1) & (at < 4), 1, np.finfo(F32).min)).all()


def test_types_are_numpy_types_too(nl):
    assert np.zeros(3).astype(nl.bfloat16).dtype == ml_dtypes.bfloat16
    assert np.dtype(nl.float8_e4m3) == ml_dtypes.float8_e4m3


@pytest.mark.parametrize(("value", "cast"), [(0, False), (1.5, False), (0, True)])
def test_mx_types_are_moved_and_not_computed(on, nl, nisa, value, cast):
    def body(x):
        t = nl.ndarray((4, 8), dtype=nl.float8_e4m3fn_x4, buffer=nl.sbuf)
        nisa.memset(dst=t, value=value)
        nisa.tensor_copy(dst=x, src=t if cast else t.view(nl.uint32))
        return x

    x = np.ones((4, 8), np.uint32)
    if value == 0 and not cast:
        assert (on(body, x, generation="gen4") == 0).all()
        return
    with pytest.raises(KernelError, match="can be moved and set to 0" if cast else "takes 0"):
        on(body, x, generation="gen4")
