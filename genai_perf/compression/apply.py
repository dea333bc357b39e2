"""The engine: a recipe over a model of which one decoder block is in memory at a time."""

import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableSequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .._errors import CalibrationError
from ..io import bitsandbytes, compressed_tensors
from . import layer as one_layer
from . import owl
from .assignment import check_holdable, recipe_of
from .capture import Layer
from .experts import Expert
from .folding import Folds
from .hessian import Hessian, Inputs
from .ranks import Ranks
from .recipe import Recipe
from .report import LayerReport
from .stages import calibrate, stages_of
from .stored_block import encode, encode_bias, put_block

# Tokens that go through a block at once; more would hold larger activations for no more speed.
BATCH_TOKENS = 4096

Progress = Callable[[int, int, str], None]


class BlockModel(Protocol):
    """What the engine needs of a model; `integrations.transformers.CheckpointModel` is one."""

    model: nn.Module
    blocks: list[tuple[str, nn.Module]]
    spelling: Any  # `integrations.spelling.Spelling`

    def load_block(self, i: int) -> nn.Module: ...
    def free_block(self, i: int) -> None: ...
    def block_inputs(self, batches: list[torch.Tensor], into: MutableSequence) -> Any: ...
    def forward_block(self, i: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor: ...
    def block_tensors(self, i: int) -> dict[str, torch.Tensor]: ...
    def round_block(self, i: int) -> None: ...
    def set_tensor(self, name: str, tensor: torch.Tensor) -> None: ...
    def checkpoint_tensor(self, name: str) -> torch.Tensor: ...
    def stored_dtype(self, name: str) -> torch.dtype: ...
    def linears(self, i: int) -> dict[str, Layer]: ...
    def tensor_name(self, name: str, layer: Layer) -> str: ...
    def stored_names(self, name: str, layer: Layer) -> list[str]: ...
    def get_weight(self, linear: Layer) -> torch.Tensor: ...
    def take_weight(self, name: str, linear: Layer) -> torch.Tensor: ...
    def set_weight(self, linear: Layer, weight: torch.Tensor) -> None: ...


class Store(Protocol):
    """Where finished blocks go; `io.resume.ResumableWriter` is one.

    Attributes:
        finished: the notes of the blocks that an earlier call wrote.
    """

    finished: list[dict]

    def write(self, tensors: dict[str, torch.Tensor], note: dict) -> None: ...
    def read(self, n: int) -> Iterable[tuple[str, torch.Tensor]]: ...


@dataclass
class Outcome:
    """What `compress_blocks` leaves behind beside the tensors it wrote; of one block or of all.

    Attributes:
        layers: one report for each linear of the blocks, in order.
        schemes: name in the checkpoint -> compressed-tensors scheme of each quantized layer; None
            under nf4.
        notes: what concerns no single layer.
    """

    layers: list[LayerReport] = field(default_factory=list)
    schemes: dict[str, compressed_tensors.Scheme | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.layers += other.layers
        self.schemes |= other.schemes
        self.notes += other.notes

    def to_dict(self) -> dict:
        """Plain data that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Outcome":
        schemes = {name: None if scheme is None else compressed_tensors.Scheme(*scheme)
                   for name, scheme in data["schemes"].items()}  # fmt: skip
        return cls([LayerReport.from_dict(entry) for entry in data["layers"]], schemes,
                   data["notes"])  # fmt: skip


@torch.no_grad()
def compress_blocks(
    model: BlockModel,
    recipe: Recipe,
    store: Store,
    *,
    windows: torch.Tensor | None = None,
    hidden: MutableSequence[torch.Tensor] | None = None,
    int8: str = "int-quantized",
    progress: Progress | None = None,
) -> Outcome:
    """Compresses block after block: run with dense weights to collect Hessians, compress every
    linear, run again with the compressed weights for the next block's inputs, write, free.

    In memory at any time: the inputs of one block for all windows, one block's weights, its
    Hessians, and the tensors of its solver.

    Args:
        model: where blocks come from.
        recipe: what to do to their linears.
        store: takes the tensors of each finished block, in the checkpoint's names and dtypes. The
            blocks that it holds already are not computed again, only run.
        windows: int64 (windows, seqlen) token ids; without, layers see no calibration, which
            suffices for recipes that need none.
        hidden: an empty sequence that holds the inputs of a block; None: a list, in memory.
        int8: the layout of int8 weights, see `io.compressed_tensors.scheme`.
        progress: called with (blocks finished, blocks in all, what runs now).

    Where torch.distributed is in use, every rank calls this with the same arguments: each runs its
    share of the windows and solves its share of a block's layers, and the first alone writes.

    Raises:
        CalibrationError: a layer's Hessian cannot be used, or a block gives NaN; names it.
        CheckpointError: a layer that the recipe's checkpoint format cannot hold.
    """
    progress = progress or (lambda done, total, what: None)
    ranks = Ranks()
    check_holdable(model, recipe)
    if ranks.count > 1 and recipe.pruner and recipe.pruner.allocation:
        raise ValueError(f"compress: allocation {recipe.pruner.allocation!r} sees one rank's "
                         f"windows only: run it on one rank")  # fmt: skip
    outcome, total = Outcome(), len(model.blocks)
    hidden = [] if hidden is None else hidden
    kwargs: list[list[dict]] = [[] for _ in range(total)]
    notes = ranks.from_first(lambda: store.finished[:total])
    finished = [Outcome.from_dict(note) for note in notes]
    if windows is not None:
        windows = ranks.share(windows)
    if windows is not None and len(finished) < total:
        progress(0, total, "embedding")
        batches = list(windows.split(max(1, BATCH_TOKENS // windows.shape[1])))
        kwargs = model.block_inputs(batches, hidden).kwargs
    folds = Folds(model, recipe)
    folds.enter(hidden)
    recipes = [recipe] * total
    if recipe.pruner and recipe.pruner.allocation and len(finished) < total:
        amounts = owl.sparsities(model, recipe, hidden, kwargs, progress)
        recipes = [recipe.at_sparsity(amount) for amount in amounts]
        hidden.clear()
        model.block_inputs(batches, hidden)
        folds.enter(hidden)
    for i, (prefix, _) in enumerate(model.blocks):
        progress(i, total, prefix)
        if i < len(finished):
            one = finished[i]
            if hidden:
                read = ranks.from_first(lambda i=i: dict(store.read(i)))
                put_block(model, i, read, one.schemes)
                _advance(model, i, hidden, kwargs[i])
        else:
            one = _compress_block(model, i, recipes[i], folds, store, int8, hidden, kwargs[i])
        outcome.add(one)
        model.free_block(i)
        _give_memory_back()
    progress(total, total, "done")
    _warn_of_few_tokens(outcome)
    return outcome


def _compress_block(
    model: BlockModel,
    i: int,
    recipe: Recipe,
    folds: Folds,
    store: Store,
    int8: str,
    hidden: MutableSequence[torch.Tensor],
    kwargs: list[dict],
) -> Outcome:
    """Loads, compresses and stores block i, and replaces its inputs in `hidden` by its outputs."""
    model.load_block(i)
    linears, outcome = model.linears(i), Outcome()
    if recipe.pruner and recipe.pruner.allocation:
        amount = f"{recipe.pruner.sparsity:.3f}"
        outcome.notes.append(f"{model.blocks[i][0]}: owl gives it a sparsity of {amount}")
    outcome.notes += folds.before_calibration(i)
    stages = stages_of(model, i, linears, recipe, hidden, kwargs)
    hessians = None
    if folds.need_calibration or len(stages) == 1:
        hessians = calibrate(model, i, linears, hidden, kwargs)
        outcome.notes += folds.after_calibration(i, recipe, hessians)
    stored = {}
    for stage in stages:
        if len(stages) > 1:
            hessians = calibrate(model, i, stage, hidden, kwargs)
        stored |= _compress_linears(model, stage, hessians, recipe, int8, outcome)
    _advance(model, i, hidden, kwargs)
    tensors = model.block_tensors(i)
    known = {model.tensor_name(name, linear) for name, linear in linears.items()}
    _note_untouched(tensors, known, outcome)
    tensors = _written(model, tensors, stored, linears)
    Ranks().from_first(lambda: store.write(tensors, outcome.to_dict()))
    return outcome


def _written(
    model: BlockModel,
    tensors: dict[str, torch.Tensor],
    stored: Mapping[str, Mapping[str, torch.Tensor]],
    linears: Mapping[str, Layer],
) -> dict[str, torch.Tensor]:
    """A block's tensors as they are written: quantized layers by their stored tensors, and experts
    that were taken out of their stack with their biases."""
    packed, gone = {}, set()
    for name, replacement in stored.items():
        layer, held = linears[name], model.tensor_name(name, linears[name])
        packed |= replacement
        gone.add(held)
        if isinstance(layer, Expert) and layer.bias is not None:
            gone.add(f"{held}_bias")
            bias = tensors[f"{held}_bias"][layer.index]
            packed |= encode_bias(model.stored_names(name, layer), bias, layer)
    dense = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return model.spelling.written(dense) | packed


def _advance(
    model: BlockModel, i: int, hidden: MutableSequence[torch.Tensor], kwargs: list[dict]
) -> None:
    if i + 1 == len(model.blocks):
        return
    for b, call in enumerate(kwargs):
        output = model.forward_block(i, hidden[b], call)
        if not torch.isfinite(output.sum()):
            raise CalibrationError(f"{model.blocks[i][0]}: its output holds NaN or infinity")
        hidden[b] = output


def _give_memory_back() -> None:
    """Returns freed memory to the system: glibc keeps what tensors below 32 MB leave in its heap,
    some hundred megabytes by the end of a block of 250 MB, and more from block to block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def quantization_config(model: BlockModel, recipe: Recipe, outcome: Outcome) -> dict | None:
    """`quantization_config` for config.json, None where nothing is quantized."""
    if not outcome.schemes:
        return None
    dense = [name for name, module in model.model.named_modules()
             if isinstance(module, nn.Linear) and name not in outcome.schemes]  # fmt: skip
    dense = [model.spelling.tensor(f"{name}.weight").removesuffix(".weight")
             for name in (*dense, *_routers(model))]  # fmt: skip
    first, scheme = next(iter(outcome.schemes.items()))
    if scheme is None:  # nf4
        dtype = model.stored_dtype(f"{first}.weight")
        nested = recipe.for_layer(first).quantizer.double_quant
        return bitsandbytes.quantization_config(double_quant=nested, dtype=dtype, skip=dense)
    return compressed_tensors.quantization_config(outcome.schemes, dense)


def _routers(model: BlockModel) -> Iterator[str]:
    """The weights in blocks that servers take for a linear layer's, and that are none in
    transformers: a router's."""
    for i, (prefix, block) in enumerate(model.blocks):
        linears = model.linears(i)
        for name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            known = isinstance(module, nn.Linear | nn.Embedding) or f"{prefix}.{name}" in linears
            if not known and isinstance(weight, nn.Parameter) and weight.dim() == 2:
                yield f"{prefix}.{name}"


def _compress_linears(
    model: BlockModel,
    linears: Mapping[str, Layer],
    hessians: dict[str, Hessian],
    recipe: Recipe,
    int8: str,
    outcome: Outcome,
) -> dict[str, dict[str, torch.Tensor]]:
    """Compresses the linears in place; returns the stored tensors of the quantized ones. Hessians
    are taken out as their layers are done, so that the largest one is not alive beside all."""
    calibrated, ranks = set(hessians), Ranks()
    shared: dict[Hessian, Inputs] = {}
    done: dict[str, tuple] = {}
    turn = 0  # layers with one Hessian stand side by side, and one rank takes them
    for name, linear in linears.items():
        hessian = hessians.pop(name, None)
        tokens = hessian.tokens if hessian else 0
        one, notes = recipe_of(model, name, linear, recipe, calibrated)
        if hessian is None or hessian not in shared:
            shared = {hessian: hessian and Inputs(hessian.matrix(), name=name)}
            turn += 1
        if turn % ranks.count != ranks.rank:
            continue
        started = time.perf_counter()
        if one is None:
            weight = model.get_weight(linear).to(
                model.stored_dtype(model.tensor_name(name, linear))
            )
            done[name] = _report(name, "dense", weight, None, 0.0, tokens, 0.0, notes), None, None
            continue
        _give_memory_back()
        weight = model.take_weight(name, linear)
        result = one_layer.compress(weight, shared[hessian], one, name=name)
        model.set_weight(linear, result.weight)
        encoded = None
        if result.qweight is not None:
            names = model.stored_names(name, linear)
            encoded = encode(names, result.qweight, int8, one.quantizer, linear)
        report = _report(name, one.name, result.weight, result.qweight, result.error, tokens,
                         time.perf_counter() - started, notes + result.notes)  # fmt: skip
        done[name] = report, encoded, result.weight if ranks.count > 1 else None
    done, stored = ranks.merged(done), {}
    for name, linear in linears.items():
        report, encoded, weight = done[name]
        outcome.layers.append(report)
        if weight is not None:
            model.set_weight(linear, weight)
        if encoded is not None:
            stored[name], schemes = encoded
            outcome.schemes |= schemes
    return stored


def _report(name, recipe, weight, qweight, error, tokens, seconds, notes) -> LayerReport:
    return LayerReport(
        name=name,
        shape=tuple(weight.shape),
        recipe=recipe,
        format="dense" if qweight is None else qweight.format,
        group_size=None if qweight is None else qweight.group_size,
        sparsity=float((weight == 0).float().mean()) if weight.numel() else 0.0,
        error=error,
        tokens=tokens,
        nbytes=weight.nbytes if qweight is None else qweight.nbytes,
        seconds=seconds,
        notes=notes,
    )


def _note_untouched(tensors: Mapping, known: Collection[str], outcome: Outcome) -> None:
    """Matrices of a block outside its linears, such as a router's, stay dense, and the report says
    so."""
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and name not in known and not name.endswith("bias"):
            outcome.notes.append(f"{name}: left dense: it belongs to no linear layer")


def _warn_of_few_tokens(outcome: Outcome) -> None:
    short = [layer for layer in outcome.layers if 0 < layer.tokens < layer.shape[1]]
    if short:
        first = short[0]
        note = (f"{len(short)} layers saw fewer calibration tokens than they have inputs, the "
                f"first is {first.name} with {first.tokens} tokens for {first.shape[1]}: "
                f"calibrate on more text")  # fmt: skip
        outcome.notes.append(note)
        warnings.warn(note, stacklevel=3)
