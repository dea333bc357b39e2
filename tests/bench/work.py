"""Work for the memory tests; it runs in a fork that cannot import test modules by relative name."""

import os
import signal


def nothing() -> int:
    return 7


def allocate(megabytes: int) -> int:
    """Touches every page, and frees all of it before it returns."""
    data = bytearray(megabytes << 20)
    data[::4096] = b"x" * len(data[::4096])
    print("noise on stdout must not reach the caller")
    return len(data)


def fail() -> None:
    raise ValueError("the work went wrong")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
