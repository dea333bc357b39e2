"""Memory that shows what a kernel does wrong: poison, guards, and tensors that lie far apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

GUARD = 256  # bytes on each side; keeps the alignment that vector instructions like
POISON = 255  # all bits set: NaN in every float type, -1 or 255 in integers


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, `torch.empty`, `empty_like` and `Tensor.new_empty` on the CPU give memory that holds
    NaN and lies between guard bytes: an element that a kernel leaves out shows in its result.

    Raises:
        AssertionError: on leaving, if a guard was written over.
    """
    plain = torch.empty
    made: list[torch.Tensor] = []

    def surrounded(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
                return tensor
            size = tensor.numel() * tensor.element_size()
            if size == 0 or tensor.untyped_storage().nbytes() != size:
                return tensor
            whole = plain(size + 2 * GUARD, dtype=torch.uint8).fill_(POISON)
            made.append(whole)
            inside = whole[GUARD : GUARD + size].view(tensor.dtype)
            inside = inside.as_strided(tensor.shape, tensor.stride())
            return inside.requires_grad_(tensor.requires_grad)

        return allocated

    with (
        mock.patch.object(torch, "empty", surrounded(torch.empty)),
        mock.patch.object(torch, "empty_like", surrounded(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", surrounded(torch.Tensor.new_empty)),
    ):
        yield
    for whole in made:
        guards = torch.cat([whole[:GUARD], whole[-GUARD:]])
        if not (guards == POISON).all():
            raise AssertionError("a kernel wrote outside of its output")


def far_apart(x: torch.Tensor, reach: int = 2**31 + 64) -> torch.Tensor:
    """A copy of x whose entries along the first dimension lie evenly apart, the last of them at
    least `reach` elements behind the first.

    Offsets pass 32 bits in a few gigabytes of addresses, of which only what x needs is ever used.
    """
    one = x[0].contiguous()
    distance = -(-reach // max(1, len(x) - 1)) + one.numel()
    room = torch.empty((len(x) - 1) * distance + one.numel(), dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, (distance, *one.stride())).copy_(x)
