"""Experts of a mixture, stacked in one parameter (count, ., .), each a layer of its own."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..nn.experts import PRODUCTS, find_stacks


@dataclass(frozen=True, eq=False)
class Expert:
    """One matrix of a stack.

    Attributes:
        module: the module that owns the stack.
        parameter: the stack's name in it.
        index: which expert.
        transposed: the stack holds (in_features, out_features) matrices, not (out, in).
    """

    module: nn.Module
    parameter: str
    index: int
    transposed: bool

    def rows(self, stack: torch.Tensor) -> torch.Tensor:
        """This expert's (out_features, in_features) of a stack, a view."""
        return stack[self.index].T if self.transposed else stack[self.index]

    @property
    def widths(self) -> set[int]:
        """in_features of all the module's stacks."""
        stacks = (p for p in self.module.parameters(recurse=False) if p.dim() == 3)
        return {stack.shape[1] if self.transposed else stack.shape[2] for stack in stacks}

    @property
    def weight(self) -> torch.Tensor:
        return self.rows(getattr(self.module, self.parameter).detach())


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
                    found[f"{path}.{index}.{stack.parameter}"] = Expert(
                        stack.owner, stack.parameter, index, stack.transposed
                    )
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
        self._stacks: dict[int, dict[int, str]] = {}
        for name, expert in experts.items():
            stack = getattr(expert.module, expert.parameter)
            self._stacks.setdefault(id(stack), {})[expert.index] = name
        # A matrix on its way from its stack to its product; held, so that its id stays its own.
        self._taken: dict[int, tuple[torch.Tensor, str]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            names, index = self._stacks.get(id(args[0])), args[1]
            one = isinstance(index, int) or (torch.is_tensor(index) and index.numel() == 1)
            if names is not None and one:
                self._taken[id(result)] = result, names[int(index)]
        elif func in _PRODUCTS and len(args) > 1:
            _, name = self._taken.pop(id(args[1]), (None, None))
            if name is not None:
                self._seen(name, args[0])
        elif func in (torch.bmm, torch.Tensor.bmm) and id(args[1]) in self._stacks:
            for index, name in self._stacks[id(args[1])].items():
                self._seen(name, args[0][index])
        return result


_PRODUCTS = (nn.functional.linear, *PRODUCTS)
