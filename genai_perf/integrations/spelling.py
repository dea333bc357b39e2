"""What the tensors of a model are called in the checkpoint that is written."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import nn

from ..io import compressed_tensors
from ..nn.experts import Stack, find_stacks
from . import skeleton


class Spelling:
    """The model's names, but for mixtures whose experts the files hold one by one: transformers
    stacks those and may call the module around them otherwise than servers do, which know the
    files' names.

    Args:
        model: without weights.
        names: of the checkpoint that is read.
    """

    def __init__(self, model: nn.Module, names: skeleton.Names):
        self._model, self._names = model, names

    @cached_property
    def _stacks(self) -> dict[str, Stack]:
        return find_stacks(self._model)

    @cached_property
    def _mixtures(self) -> tuple[str, ...]:
        """The modules around experts that the files hold one by one, each with a dot."""
        apart = {name for name in self._stacks if self._names.expert(name, 0)}
        return tuple(sorted({f"{name.rsplit('.', 2)[0]}." for name in apart}))

    def expert(self, stack: str, index: int) -> list[str]:
        """The layers that matrix `index` of a stack becomes: what the files call them, else
        "<experts>.<index>.<linear>", as llm-compressor takes stacks apart."""
        above = stack.rpartition(".")[0]
        found = self._names.expert(stack, index)
        return found or [f"{above}.{index}.{name}" for name in self._stacks[stack].linears]

    def tensor(self, name: str) -> str:
        """The name of a tensor that is written as it is."""
        return self._names.find(name)[0] if name.startswith(self._mixtures) else name

    def written(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Dense tensors under the names that they are written with, stacks apart where the files
        had them so."""
        found = {}
        for name, tensor in tensors.items():
            if name not in self._stacks or not self._names.expert(name, 0):
                found[self.tensor(name)] = tensor
                continue
            for i, matrix in enumerate(tensor):
                parts = self._names.expert(name, i)
                found |= {f"{part}.weight": rows.clone() for part, rows in
                          zip(parts, matrix.chunk(len(parts)), strict=True)}  # fmt: skip
        return found

    def read(
        self, names: Iterable[str], tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The other way round: those of the model's tensors `names` that `tensors` hold."""
        for name in names:
            if name in self._stacks and self._names.expert(name, 0):
                each = [[f"{part}.weight" for part in self._names.expert(name, i)]
                        for i in range(len(self._stacks[name].weight))]  # fmt: skip
                if all(part in tensors for parts in each for part in parts):
                    rows = [torch.cat([tensors[part] for part in parts]) for parts in each]
                    yield name, torch.stack(rows)
            elif self.tensor(name) in tensors:
                yield name, tensors[self.tensor(name)]

    def unread(self, schemes: Mapping[str, compressed_tensors.Scheme | None]) -> list[str]:
        """Those of the quantized layers that are experts which transformers does not load."""
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as APART

        renaming, found = skeleton.Renaming(self._model), []
        owners = {name.rpartition(".")[0]: type(stack.owner).__name__
                  for name, stack in self._stacks.items()}  # fmt: skip
        for name, scheme in schemes.items():
            match = compressed_tensors.EXPERT.search(name)
            if match is None or owners.get(name[: match.start()] + ".experts") in APART:
                continue
            known = renaming(f"{name}.weight")[0] in self._stacks
            if not known or (scheme is not None and scheme.rounds_to_int8):
                found.append(name)
        return found
