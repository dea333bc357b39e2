"""What the two cores of a launch do together."""

from .dma import check_reach, meter
from .errors import refuse, require
from .machine import HANDLE, current, from_generation, mark, raw


def _together(what: str, machine) -> None:
    if machine.barrier is None:
        refuse(f"{what}: the kernel was not launched on two cores")
    machine.barrier()


def core_barrier(data=None, cores=(0, 1), engine=None, name=None):
    """Both cores of the launch arrive before either goes on."""
    machine = current()
    from_generation(machine, 3, "core_barrier")
    if machine.num_programs > 1:
        _together("core_barrier", machine)
    return HANDLE


def sendrecv(src, dst, send_to_rank, recv_from_rank, pipe_id, dma_engine=None, name=None):
    """src goes to the other core's dst, the other core's src to dst."""
    what, machine = "sendrecv", current()
    from_generation(machine, 3, what)
    check_reach(what, "src", src)
    check_reach(what, "dst", dst)
    require(dst.dtype is src.dtype and dst.size == src.size,
            f"{what}: dst {dst!r} must have the type and size of src {src!r}")  # fmt: skip
    peer = 1 - machine.program_id
    require(send_to_rank == recv_from_rank == peer,
            f"{what}: core {1 - peer} exchanges with {peer}, got {send_to_rank} and "
            f"{recv_from_rank}")  # fmt: skip
    meter(machine, what, dst, src)
    at = len(machine.sent)
    machine.sent.append((pipe_id, src.dtype, None if machine.dry else raw(src).copy()))
    _together(what, machine)
    if at >= len(machine.other.sent):
        refuse(f"{what}: the other core is at a core_barrier, not at a sendrecv")
    pipe, dtype, values = machine.other.sent[at]
    require((pipe, dtype) == (pipe_id, dst.dtype) and (machine.dry or values.size == dst.size),
            f"{what}: the other core sends no {dst!r} on pipe {pipe_id}")  # fmt: skip
    if not machine.dry:
        dst.data[...] = values.reshape(dst.shape)
        mark(dst)
    return HANDLE
