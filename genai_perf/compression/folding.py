"""The steps of a recipe that fold into weights, beside the engine's pass over the blocks."""

from collections.abc import Iterator, Mapping, MutableSequence

import torch

from .._errors import CheckpointError
from .hessian import Hessian
from .recipe import Recipe
from .rotation import BlockRotation
from .smoothing import smooth
from .steps import Hadamard
from .structure import Probe

_PROBE_TOKENS = 8


class Folds:
    """What a recipe folds into the weights of a model, block by block.

    Args:
        model: a `BlockModel`.
        recipe: of all its layers.
    """

    def __init__(self, model, recipe: Recipe):
        self._model, self._rotation = model, rotation_of(model, recipe)
        self._steps = [step for step in recipe.folds if not isinstance(step, Hadamard)]
        if not recipe.folds:
            return
        vocabulary = model.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(_PROBE_TOKENS)[None] % vocabulary
        inputs = model.block_inputs([ids], [])
        self._probe = Probe(inputs.hidden[0], [calls[0] for calls in inputs.kwargs])
        if self._rotation:
            self._rotation.check_embedding(ids, self._probe.hidden)

    @property
    def need_calibration(self) -> bool:
        return bool(self._steps)

    def enter(self, hidden: MutableSequence[torch.Tensor]) -> None:
        """Replaces the inputs of the first block by those of the folded model."""
        if self._rotation:
            for b, batch in enumerate(hidden):
                hidden[b] = self._rotation.stream(batch).to(batch.dtype)

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """The outputs of the last block as the original model's final norm and head take them."""
        return self._rotation.stream.back(hidden).to(hidden.dtype) if self._rotation else hidden

    def before_calibration(self, i: int) -> tuple[str, ...]:
        """Folds what needs no calibration into block i, loaded; returns notes.

        Raises:
            CheckpointError: a block that is not on the device whole.
        """
        if i in self._model.offloaded and (self._rotation or self._steps):
            prefix, (taken, free) = self._model.blocks[i][0], self._model.offloaded[i]
            raise CheckpointError(f"{prefix}: takes {taken} bytes where {free} are free, and steps "
                                  f"that fold need it whole: use device='cpu'")  # fmt: skip
        if not self._rotation:
            return ()
        notes = self._rotation.block(i, self._probe)
        self._model.round_block(i)
        return notes

    def after_calibration(
        self, i: int, recipe: Recipe, hessians: Mapping[str, Hessian]
    ) -> tuple[str, ...]:
        """Folds the rest, and changes the Hessians as the inputs change; returns notes."""
        notes: tuple[str, ...] = ()
        for step in self._steps:
            notes += smooth(self._model, i, step, recipe, hessians, self._probe)
        if self._steps:
            self._model.round_block(i)
        return notes


def rotation_of(model, recipe: Recipe) -> BlockRotation | None:
    step = next((step for step in recipe.folds if isinstance(step, Hadamard)), None)
    return step and BlockRotation(model, seed=step.seed, heads=step.heads)


def outside(model, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors outside its blocks, as the recipe leaves them."""
    rotation = rotation_of(model, recipe)
    return rotation.outside(model.other_tensors()) if rotation else model.other_tensors()


def config(recipe: Recipe, config: dict) -> dict:
    """config.json as the recipe leaves it: a rotated head is no longer the embedding."""
    rotated = any(isinstance(step, Hadamard) for step in recipe.folds)
    return {**config, "tie_word_embeddings": False} if rotated else dict(config)
