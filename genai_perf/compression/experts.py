"""Experts of a mixture, stacked in one parameter (count, ., .), each a layer of its own."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..nn.experts import PRODUCTS, Stack, find_stacks


@dataclass(frozen=True, eq=False)
class Expert:
    """One matrix of a stack.

    Attributes:
        stack: where it lies.
        index: which expert.
    """

    stack: Stack
    index: int

    def rows(self, stack: torch.Tensor) -> torch.Tensor:
        """This expert's (out_features, in_features) of a stack, a view."""
        return stack[self.index].T if self.stack.transposed else stack[self.index]

    @property
    def widths(self) -> set[int]:
        """in_features of all the module's stacks."""
        stacks = (p for p in self.stack.owner.parameters(recurse=False) if p.dim() == 3)
        return {one.shape[1] if self.stack.transposed else one.shape[2] for one in stacks}

    @property
    def weight(self) -> torch.Tensor:
        return self.rows(self.stack.weight.detach())

    @property
    def bias(self) -> torch.Tensor | None:
        """(out_features,), what is added to its product; None where nothing is."""
        biases = getattr(self.stack.owner, f"{self.stack.parameter}_bias", None)
        return None if biases is None else biases.detach()[self.index]


def find(module: nn.Module) -> dict[str, Expert]:
    """The experts of a block that are stacked, as "<module>.<index>.<parameter>".

    What a stack is, and how its matrices lie: see `genai_perf.nn.experts.find_stacks`.
    """
    found = {}
    stacks = find_stacks(module)
    owners = {id(stack.owner): name.rpartition(".")[0] for name, stack in stacks.items()}
    for owner, path in owners.items():
        mine = [stack for stack in stacks.values() if id(stack.owner) == owner]
        for index in range(max(len(stack.weight) for stack in mine)):
            for stack in mine:
                if index < len(stack.weight):
                    found[f"{path}.{index}.{stack.parameter}"] = Expert(stack, index)
    return found


def has_calibrated_sibling(name: str, calibrated: Collection[str]) -> bool:
    """Whether `name` is an expert's layer, stacked or a module of its own, and the same layer of
    another expert beside it is among the names `calibrated`."""
    match = re.fullmatch(r"(.*experts)\.\d+\.(.+)", name)
    if match is None:
        return False
    sibling = re.compile(rf"{re.escape(match[1])}\.\d+\.{re.escape(match[2])}")
    return any(sibling.fullmatch(other) for other in calibrated)


class Watch(TorchFunctionMode):
    """While it is entered, calls `seen(name, x)` with the inputs x (tokens, in_features) of every
    expert that is multiplied: a matrix taken from its stack by index and given to linear or
    matmul, or a whole stack given to bmm. transformers' "eager" experts do one of these."""

    def __init__(self, experts: Mapping[str, Expert], seen: Callable[[str, torch.Tensor], None]):
        super().__init__()
        self._seen = seen
        self._stacks: dict[Stack, dict[int, str]] = {}
        for name, expert in experts.items():
            self._stacks.setdefault(expert.stack, {})[expert.index] = name
        # A matrix on its way from its stack to its product; held, so that its id stays its own.
        self._taken: dict[int, tuple[torch.Tensor, str]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            names, index = self._names(args[0]), args[1]
            one = isinstance(index, int) or (torch.is_tensor(index) and index.numel() == 1)
            if names and one:
                self._taken[id(result)] = result, names[int(index)]
        elif func in _PRODUCTS and len(args) > 1:
            _, name = self._taken.pop(id(args[1]), (None, None))
            if name is not None:
                self._seen(name, args[0])
        elif func in (torch.bmm, torch.Tensor.bmm):
            for index, name in self._names(args[1]).items():
                # Such experts are given every token, zeros where it is not routed to them.
                routed = args[0][index][args[0][index].any(-1)]
                if len(routed):
                    self._seen(name, routed)
        return result

    def _names(self, tensor: torch.Tensor) -> dict[int, str]:
        """The experts by index if this is a stack now: hooks may replace the parameter."""
        found = (names for stack, names in self._stacks.items() if stack.weight is tensor)
        return next(found, {})


_PRODUCTS = (nn.functional.linear, *PRODUCTS)
