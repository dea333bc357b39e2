"""Inputs of a block's layers, seen while the block runs, and the Hessians they add up to."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .._errors import CalibrationError
from .experts import Expert, Watch
from .hessian import Hessian

Layer = nn.Module | Expert


@contextmanager
def watched(
    layers: Mapping[str, Layer], seen: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While the `with` lasts, `seen(full name, x)` is called with every input x (..., in_features)
    of every one of `layers`, before a module runs and after an expert ran."""

    def hook(name: str):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen(name, args[0] if args else kwargs["input"])

        return before

    with ExitStack() as stack:
        stacked = {}
        for name, layer in layers.items():
            if isinstance(layer, Expert):
                stacked[name] = layer
            else:
                handle = layer.register_forward_pre_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
        if stacked:
            stack.enter_context(Watch(stacked, seen))
        yield


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
def inputs_of(layers: Mapping[str, Layer]) -> Iterator[dict[str, Hessian]]:
    """While the `with` lasts, the inputs of `layers` (by full name) are added up in the Hessians,
    by full name, that it yields. A layer that is never called, such as an expert to which no token
    is routed, has none."""
    capture = Capture()
    with watched(layers, capture.add):
        yield capture.hessians
    capture.check()
