"""Experts of a checkpoint, each projection a layer of its own, and the model's stacks of them."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .._errors import CheckpointError
from ..formats import QuantizedTensor, rows
from ..io.checkpoints import Checkpoint
from ..io.stored import Stored
from ..nn import QuantizedStack
from ..nn.experts import Stack, find_stacks, put
from .skeleton import Renaming

_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)$")


def place_stacks(checkpoint: Checkpoint, model: nn.Module, layers: dict[str, Stored],
                 backend: str | None) -> None:  # fmt: skip
    """Puts a QuantizedStack in the place of every stack whose experts are all among `layers`, and
    takes them out of it; a stack with others is left as it is, with a warning.

    A checkpoint names an expert's projection "...experts.3.gate_proj", as transformers' table of
    conversions has it or llm-compressor takes stacks apart (several make one matrix of the stack),
    or "...experts.3.gate_up_proj", after the stack.

    Raises:
        CheckpointError: parts that do not fit together, or another shape than the model has.
    """
    stacks, renaming = find_stacks(model), Renaming(model)
    parts: dict[str, dict[int, dict[int, str]]] = {}  # stack -> expert -> order -> layer
    for name in layers:
        if (match := _EXPERT.match(name)) is not None:
            # A converter's pattern ends in .weight, which a quantized layer's tensors do not.
            target, pattern = renaming(f"{name}.weight")
            order = 0
            if pattern is not None:
                order = renaming.converters[pattern].source_patterns.index(pattern)
            else:
                target, order = _place(stacks, renaming(f"{match[1]}.{match[3]}")[0])
            if target in stacks:
                parts.setdefault(target, {}).setdefault(int(match[2]), {})[order] = name
    for target, experts in parts.items():
        stack, count = stacks[target], len(stacks[target].weight)
        wanted = max(len(found) for found in experts.values())
        lacking = next((i for i in range(count) if len(experts.get(i, ())) != wanted), None)
        if lacking is not None:
            warnings.warn(f"{target}: expert {lacking} of {count} is not quantized: all are read "
                          f"dense", stacklevel=4)  # fmt: skip
            continue
        stored = ([layers.pop(name) for _, name in sorted(found.items())]
                  for _, found in sorted(experts.items()))  # fmt: skip
        read = [_join(checkpoint, target, one, model, stack.interleaved) for one in stored]
        rows_, columns = stack.weight.shape[1:]
        shape = (columns, rows_) if stack.transposed else (rows_, columns)
        if (bad := next((q for q in read if tuple(q.shape) != shape), None)) is not None:
            raise CheckpointError(f"{checkpoint.path}: {target!r}: its experts must have shape "
                                  f"{list(shape)}, got {list(bad.shape)}")  # fmt: skip
        put(stack, QuantizedStack(read, transposed=stack.transposed, backend=backend))


def _place(stacks: Mapping[str, Stack], name: str) -> tuple[str, int]:
    """The stack that holds "<experts>.<linear>", its name as it is if there is none, and which of
    the stack's linears that is."""
    above, _, leaf = name.rpartition(".")
    for target, stack in stacks.items():
        if target.rpartition(".")[0] == above and leaf in stack.linears:
            return target, stack.linears.index(leaf)
    return name, 0


def _join(checkpoint, target, stored: list[Stored], model, interleaved: bool) -> QuantizedTensor:
    try:
        joined = rows.join([one.read(checkpoint, model.config.dtype) for one in stored],
                           interleaved=interleaved and len(stored) > 1)  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {target!r}: {error}") from error
    return joined.own()


@dataclass(frozen=True)
class Rows:
    """A parameter (experts, features) that a checkpoint holds in parts.

    Attributes:
        parts: for each expert the tensors that make up its row, in order.
        interleaved: their numbers take turns in the row.
    """

    parts: list[list[str]]
    interleaved: bool

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        put = rows.in_turns if self.interleaved else torch.cat
        return torch.stack([put([checkpoint.tensor(p) for p in parts]) for parts in self.parts])


def stacked_biases(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Rows]:
    """The biases of stacks, by the full names of their parameters, that the checkpoint holds
    beside experts that were taken apart."""
    found, names = {}, set(checkpoint.names())
    for target, stack in find_stacks(model).items():
        above = target.rpartition(".")[0]
        parts = [[f"{above}.{i}.{linear}.bias" for linear in stack.linears]
                 for i in range(len(stack.weight))]  # fmt: skip
        if names.issuperset(part for each in parts for part in each):
            found[f"{target}_bias"] = Rows(parts, stack.interleaved)
    return found


def stored_parts(model: nn.Module, name: str,
                 stack: QuantizedStack) -> Iterator[tuple[str, QuantizedTensor]]:  # fmt: skip
    """(layer name, weight) of each expert of the stack `name`, as the family's checkpoints name
    them where rows can be cut so, else after the stack."""
    converters = Renaming(model).converters.values()
    sources = next((list(c.source_patterns) for c in converters
                    if name.endswith(_plain(c.target_patterns[0]))), [])  # fmt: skip
    above, _, leaf = name.rpartition(".")
    names = [f"{above}.*.{leaf}"]
    if sources and all("experts.*." in _plain(source) for source in sources):
        names = [f"{above}.*.{_plain(s).rpartition('experts.*.')[2].removesuffix('.weight')}"
                 for s in sources]  # fmt: skip
    for i, weight in enumerate(stack.weights):
        qweight = weight.tensor()
        try:
            cut = rows.split(qweight, len(names)) if len(names) > 1 else [qweight]
        except ValueError:
            names, cut = [f"{above}.*.{leaf}"], [qweight]
        for form, part in zip(names, cut, strict=True):
            yield form.replace("*", str(i)), part


def _plain(pattern: str) -> str:
    return pattern.replace("\\", "")
