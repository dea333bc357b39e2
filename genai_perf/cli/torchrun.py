"""Commands under torchrun: the ranks join, and the first alone speaks."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ranks() -> Iterator[bool]:
    """Joins the process group that torchrun describes (gloo: commands compute on the CPU), where
    it started this process; yields whether this is the first rank, or the only process."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
