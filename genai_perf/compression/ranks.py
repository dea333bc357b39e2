"""Calibration and solvers over the ranks of torch.distributed (torchrun): each rank runs its share
of the windows, Hessians are summed, and the layers of a block are shared out.

What one rank finds, the others are given as Python objects, so that all hold the same bits.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .hessian import Hessian

T = TypeVar("T")


class Ranks:
    """The ranks at work; one where torch.distributed is not in use.

    Attributes:
        rank, count: this one, and how many.
    """

    def __init__(self):
        many = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, windows: torch.Tensor) -> torch.Tensor:
        """This rank's windows of (windows, seqlen), at least one."""
        if len(windows) < self.count:
            raise ValueError(f"calibration: {self.count} ranks need a window each, "
                             f"got {len(windows)}")  # fmt: skip
        return windows[self.rank :: self.count]

    def merged(self, mine: Mapping[str, T]) -> dict[str, T]:
        """The entries of all ranks' mappings, which have no key in common."""
        return {key: value for part in self._all(dict(mine)) for key, value in part.items()}

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives, or raises, on the first rank, on all of them."""
        if self.count == 1:
            return make()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = make()
            except (ValueError, OSError) as error:
                found[1] = error
        dist.broadcast_object_list(found)
        # gloo's thread still has to let go of what it carried, for which it needs the interpreter:
        # a process that ends here at once would take it away from that thread, and abort.
        dist.barrier()
        if found[1] is not None:
            raise found[1]
        return found[0]

    def summed(self, hessians: dict[str, Hessian]) -> dict[str, Hessian]:
        """The Hessians over all ranks' tokens; layers that share one here share one there.

        A layer that this rank did not call, such as an expert, is called by another.
        """
        if self.count == 1:
            return hessians
        groups: dict[int, list[str]] = {}
        for name, hessian in hessians.items():
            groups.setdefault(id(hessian), []).append(name)
        mine = {tuple(names): len(hessians[names[0]].peak) for names in groups.values()}
        everywhere = {names: size for part in self._all(mine) for names, size in part.items()}
        found: dict[str, Hessian] = {}
        for names in _joined(everywhere):
            size = next(n for group, n in everywhere.items() if names[0] in group)
            own = next((hessians[name] for name in names if name in hessians), None)
            own = Hessian(size, name=names[0]) if own is None else own
            self._sum(own)
            found |= dict.fromkeys(names, own)
        return found

    def _sum(self, hessian: Hessian) -> None:
        tokens = torch.tensor(hessian.tokens)
        dist.all_reduce(tokens)
        hessian.weigh(hessian.tokens / max(1, int(tokens)), int(tokens))
        dist.all_reduce(hessian.sums)
        dist.all_reduce(hessian.peak, op=dist.ReduceOp.MAX)

    def _all(self, mine: T) -> list[T]:
        if self.count == 1:
            return [mine]
        found: list = [None] * self.count
        dist.all_gather_object(found, mine)
        return found


def _joined(groups: Iterable[tuple[str, ...]]) -> list[list[str]]:
    """Groups of names with those merged that have a name in common, each in order of its names."""
    merged: list[set[str]] = []
    for group in groups:
        touching = [other for other in merged if other & set(group)]
        merged = [other for other in merged if other not in touching]
        merged.append(set(group).union(*touching))
    return sorted(sorted(names) for names in merged)
