"""Hessians of a block's linear layers, collected while the block runs."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .._errors import CalibrationError
from .hessian import Hessian


class Capture:
    """Adds up layer inputs; layers that are always given the same tensor (q, k and v) share.

    Attributes:
        hessians: full name -> Hessian of every layer that was called.
    """

    def __init__(self):
        self.hessians: dict[str, Hessian] = {}
        self._last: dict[Hessian, weakref.ref] = {}  # the tensor that was added last
        self._added: Counter[Hessian] = Counter()
        self._calls: Counter[str] = Counter()

    def add(self, name: str, x: torch.Tensor) -> None:
        self._calls[name] += 1
        if name not in self.hessians:
            # One that has missed nothing: its first and only tensor so far is this one.
            shared = (h for h, ref in self._last.items() if ref() is x and self._added[h] == 1)
            self.hessians[name] = next(shared, None) or Hessian(
                x.shape[-1], name=name, device=x.device
            )
        hessian = self.hessians[name]
        if hessian not in self._last or self._last[hessian]() is not x:
            hessian.add(x)
            self._added[hessian] += 1
            self._last[hessian] = weakref.ref(x)

    def check(self) -> None:
        """Raises CalibrationError where layers that shared their first input later did not."""
        for hessian, added in self._added.items():
            sharing = [name for name, other in self.hessians.items() if other is hessian]
            if any(self._calls[name] != added for name in sharing):
                raise CalibrationError(f"{', '.join(sharing)}: share their input on some calls "
                                       f"only, which calibration cannot tell apart")  # fmt: skip


@contextmanager
def inputs_of(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Hessian]]:
    """While the `with` lasts, the inputs of `linears` (full name -> module) are added up in the
    Hessians, by full name, that it yields."""
    capture = Capture()

    def hook(name: str):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            capture.add(name, args[0] if args else kwargs["input"])

        return before

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in linears.items()
    ]
    try:
        yield capture.hessians
        capture.check()
    finally:
        for handle in handles:
            handle.remove()
