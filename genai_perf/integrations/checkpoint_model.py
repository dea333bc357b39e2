"""A checkpoint as a transformers model that is never whole in memory: one block at a time.

What the blocks are called with (masks, position embeddings, arguments that differ from layer to
layer) comes from the model's own code, which runs once with every block replaced by a recorder.
So there is no code per architecture.
"""

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import CalibrationError, CheckpointError
from ..compression import experts
from ..compression.capture import Layer
from ..io.checkpoints import Checkpoint, check_finite
from . import offload, skeleton
from .recording import Recorded, replaced, same
from .spelling import Spelling

FreeMemory = Callable[[torch.device], int | None]


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks are called with.

    hidden: one (batch, seqlen, hidden) tensor per batch, the input of block 0.
    kwargs: `kwargs[i][b]`, the keyword arguments of block i for batch b beside the hidden states;
        equal ones are one object, so 512 batches hold one mask.
    """

    hidden: list[torch.Tensor]
    kwargs: list[list[dict[str, Any]]]


class CheckpointModel:
    """A transformers model on the meta device whose blocks are loaded and freed one by one.

        model = CheckpointModel(path)
        inputs = model.block_inputs(batches)             # embeddings, masks, positions
        hidden = inputs.hidden
        for i, (prefix, block) in enumerate(model.blocks):
            model.load_block(i)                          # NaN refused
            hidden = [model.forward_block(i, h, kw) for h, kw in zip(hidden, inputs.kwargs[i])]
            writer.write(model.block_tensors(i))
            model.free_block(i)
        for name, tensor in model.other_tensors():       # embeddings, final norm, head
            writer.write({name: tensor})
        writer.commit(model.checkpoint.config)

    Every name is the model's own (that of `save_pretrained`), also where the files spell it
    differently; write these names.

    Args:
        path: checkpoint folder, dense (not quantized).
        dtype: of loaded weights and of the computation; None: that of the checkpoint.
        device: where loaded blocks and hidden states live.
        calibrated: Hessians will be collected beside the blocks.
        free_memory: bytes free on a device, None for any number. A block that does not fit with its
            Hessians is loaded on the CPU, and run on the device one layer at a time
            (`offload`); tested with a CPU as the device, not run on a GPU.

    Raises:
        CheckpointError: see `Checkpoint`; also an unknown architecture, a tensor that is missing
            or has another shape than the config says, a checkpoint that is quantized already.
    """

    def __init__(self, path: str | Path, *, dtype: torch.dtype | None = None,
                 device: str | torch.device = "cpu", calibrated: bool = False,
                 free_memory: FreeMemory = offload.free_memory):  # fmt: skip
        self.checkpoint = Checkpoint(path)
        if self.checkpoint.quantization is not None:
            method = self.checkpoint.quantization.get("quant_method")
            raise CheckpointError(f"{self.checkpoint.path}: is quantized already ({method}): "
                                  f"name the dense checkpoint")  # fmt: skip
        self.model = skeleton.build(self.checkpoint, dtype)
        self.config = self.model.config
        self.dtype: torch.dtype = self.config.dtype
        self.device = torch.device(device)
        self._calibrated, self._free_memory = calibrated, free_memory
        # Blocks that did not fit -> bytes they take, bytes that were free.
        self.offloaded: dict[int, tuple[int, int]] = {}
        self.names = skeleton.Names(self.checkpoint, self.model)
        self.spelling = Spelling(self.model, self.names)
        self.blocks: list[tuple[str, nn.Module]] = skeleton.find_blocks(self.model)
        self._shapes = {name: tensor.shape for name, tensor in skeleton.stored(self.model)}
        self._prefixes = tuple(f"{prefix}." for prefix, _ in self.blocks)
        for name, shape in self._shapes.items():
            self.names.check(name, shape)  # before any work

    @property
    def unused(self) -> list[str]:
        """Tensors of the checkpoint that the model does not have; they are not carried over."""
        used = {source for name in self._shapes for source in self.names.find(name)}
        return [name for name in self.checkpoint.names() if name not in used]

    def check_finite(self) -> None:
        """Refuses NaN and infinity anywhere in the model's tensors, one tensor in memory at a time.

        Raises:
            CheckpointError: names the tensor and the place.
        """
        for name in self._shapes:
            for source in self.names.find(name):
                check_finite(source, self.checkpoint.tensor(source))

    @cached_property
    def tokenizer(self):
        """The folder's tokenizer, or None where it has none."""
        from transformers import AutoTokenizer

        folder = self.checkpoint.path
        if not any(folder.glob("tokenizer*.json")):
            return None
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error

    # --- weights -----------------------------------------------------------------------------

    def load_block(self, i: int) -> nn.Module:
        """Gives block i its weights in `dtype`, checked for NaN and infinity; returns the block."""
        prefix, block = self.blocks[i]
        names = [name for name, _ in skeleton.stored(block, f"{prefix}.")]
        taken, free = self._bytes(i, names), self._free_memory(self.device)
        if free is not None and taken > free:
            self.offloaded.setdefault(i, (taken, free))
        self._load(names, torch.device("cpu") if i in self.offloaded else self.device)
        return block

    def _bytes(self, i: int, names: list[str]) -> int:
        """Of a block's weights, and of at most as many Hessians as it has layers."""
        weights = sum(self._shapes[name].numel() for name in names) * self.dtype.itemsize
        if not self._calibrated:
            return weights
        widths = (self.get_weight(layer).shape[1] for layer in self.linears(i).values())
        return weights + sum(4 * width**2 for width in widths)

    def free_block(self, i: int) -> None:
        """Takes block i's weights away again."""
        prefix, block = self.blocks[i]
        self._free(name for name, _ in skeleton.stored(block, f"{prefix}."))

    def block_tensors(self, i: int) -> dict[str, torch.Tensor]:
        """Block i's tensors as they are now (loaded, perhaps modified), in the stored dtype."""
        prefix, block = self.blocks[i]
        return {name: tensor.detach().to(self.stored_dtype(name))
                for name, tensor in skeleton.stored(block, f"{prefix}.")}  # fmt: skip

    def round_block(self, i: int) -> None:
        """Rounds block i's tensors, loaded, to their stored dtype: what is run is what a reader of
        `block_tensors` will run."""
        for name, tensor in self.block_tensors(i).items():
            self.set_tensor(name, tensor)

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor of a loaded block, perhaps a changed one, in its place."""
        parent, _, leaf = name.rpartition(".")
        device = getattr(self.model.get_submodule(parent), leaf).device
        skeleton.assign(self.model, name, tensor.to(device, self.dtype, copy=True))

    def checkpoint_tensor(self, name: str) -> torch.Tensor:
        """A tensor of the model as the checkpoint stores it."""
        return self.names.get(name, self._shapes[name])

    def other_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything outside the blocks, straight from the files, one at a time; a tied tensor
        once, and NaN refused."""
        for name, shape in self._shapes.items():
            if not name.startswith(self._prefixes):
                tensor = self.names.get(name, shape)
                check_finite(name, tensor)
                yield name, tensor

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the checkpoint holds a tensor of the model."""
        return self.checkpoint.info(self.names.find(name)[0]).dtype

    def linears(self, i: int) -> dict[str, Layer]:
        """Block i's linear layers by full name: nn.Linear and Conv1D, and every expert of stacked
        ones as "<experts>.<index>.<parameter>"."""
        prefix, block = self.blocks[i]
        modules = {name: module for name, module in block.named_modules()
                   if skeleton.is_linear(module)}  # fmt: skip
        found = modules | experts.find(block)
        return {f"{prefix}.{name}": layer for name, layer in found.items()}

    @staticmethod
    def tensor_name(name: str, layer: Layer) -> str:
        """The tensor that holds the weight of the layer of this full name: an expert's is its
        stack."""
        if isinstance(layer, experts.Expert):
            return f"{name.rsplit('.', 2)[0]}.{layer.stack.parameter}"
        return f"{name}.weight"

    def stored_names(self, name: str, layer: Layer) -> list[str]:
        """What the written checkpoint calls the layer of this full name: itself; an expert has
        several parts that share its rows (gate and up), see `Spelling.expert`."""
        if not isinstance(layer, experts.Expert):
            return [name]
        return self.spelling.expert(self.tensor_name(name, layer), layer.index)

    @staticmethod
    def as_rows(layer: Layer, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of `tensor_name` -> the layer's (out_features, in_features), a view: Conv1D's
        is transposed."""
        if isinstance(layer, experts.Expert):
            return layer.rows(tensor)
        return tensor.T if skeleton.is_conv1d(layer) else tensor

    def get_weight(self, layer: Layer) -> torch.Tensor:
        """The weight as (out_features, in_features), a view where it is on the model's device."""
        if isinstance(layer, experts.Expert):
            weight = layer.weight
        else:
            weight = self.as_rows(layer, layer.weight.detach())
        return weight if weight.is_meta else weight.to(self.device)

    def take_weight(self, name: str, layer: Layer) -> torch.Tensor:
        """The weight of the layer of this full name in the dtype that the checkpoint stores; a
        layer with a copy in another gives that one up until it gets its new weight."""
        weight = self.get_weight(layer)
        taken = weight.to(self.stored_dtype(self.tensor_name(name, layer)))
        if taken is not weight and not isinstance(layer, experts.Expert):
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        return taken

    @staticmethod
    def set_weight(linear: Layer, weight: torch.Tensor) -> None:
        """Replaces the weight by (out_features, in_features) values, kept in the layer's dtype."""
        if isinstance(linear, experts.Expert):
            linear.weight.copy_(weight)  # a view of the stack
            return
        value = (weight.T if skeleton.is_conv1d(linear) else weight).contiguous()
        old = linear.weight
        linear.weight = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)

    # --- running -----------------------------------------------------------------------------

    @torch.no_grad()
    def block_inputs(self, batches: list[torch.Tensor],
                     into: MutableSequence[torch.Tensor] | None = None) -> BlockInputs:  # fmt: skip
        """Runs the model up to its first block, and its own code around the others.

        Args:
            batches: input ids, int64 (batch, seqlen) each, without padding.
            into: an empty sequence that takes the hidden states; None: a list.

        Raises:
            CalibrationError: a token that the model has no embedding for.
        """
        for batch in batches:
            self._check_tokens(batch)
        outside = self._outside(head=False)
        self._load(outside)
        returns_tuple = self._returns_tuple(batches[0])
        hidden = [] if into is None else into
        kwargs: list[list[dict]] = [[] for _ in self.blocks]

        def record(i: int, states: torch.Tensor, call: dict):
            if i == 0:
                hidden.append(states)
            call = next((old for old in kwargs[i] if same(old, call)), call)
            kwargs[i].append(call)
            if i == len(self.blocks) - 1:
                raise Recorded
            return (states,) if returns_tuple else states

        with replaced(self.blocks, record):
            for batch in batches:
                with suppress(Recorded):
                    self.model(input_ids=batch.to(self.device), use_cache=False)
        self._free(outside)
        return BlockInputs(hidden, kwargs)

    @torch.no_grad()
    def forward_block(self, i: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Block i's output for hidden states and the keyword arguments of `block_inputs`."""
        output = self._call(i, hidden, kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _call(self, i: int, hidden: torch.Tensor, kwargs: dict[str, Any]):
        block = self.blocks[i][1]
        hooks = offload.one_layer_at_a_time(block, self.device)
        with hooks if i in self.offloaded else nullcontext():
            return block(hidden, **kwargs)

    def logits(self, batch: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits for the last block's output: final norm and head, by its own code.

        Args:
            batch: the input ids that `hidden` came from, (batch, seqlen).
            hidden: output of the last block, (batch, seqlen, hidden).
        """
        (logits,) = self.each_logits([(batch, hidden)])
        return logits

    def each_logits(
        self, calls: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        """`logits` of one call after the other; what they need of the model is read once."""
        outside, returns_tuple = self._outside(head=True), None
        self._load(outside)
        try:
            for batch, hidden in calls:
                self._check_tokens(batch)
                if returns_tuple is None:
                    returns_tuple = self._returns_tuple(batch)
                output = (hidden,) if returns_tuple else hidden
                with torch.no_grad(), replaced(self.blocks, lambda i, states, call, o=output: o):
                    logits = self.model(input_ids=batch.to(self.device), use_cache=False).logits
                yield logits
        finally:
            self._free(outside)

    def _check_tokens(self, batch: torch.Tensor) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        low, high = (int(batch.min()), int(batch.max())) if batch.numel() else (0, 0)
        if low < 0 or high >= rows:
            raise CalibrationError(f"token ids must be in 0..{rows - 1}, got {low} to {high}: "
                                   f"the tokenizer is not that of the model")  # fmt: skip

    def _outside(self, head: bool) -> list[str]:
        """Names of the stored tensors outside the blocks; without `head`, not the output matrix,
        unless it is the embedding too."""
        output = self.model.get_output_embeddings()
        skip = set() if head or output is None else {id(p) for p in output.parameters()}
        skip -= {id(p) for p in self.model.get_input_embeddings().parameters()}
        return [name for name, tensor in skeleton.stored(self.model)
                if not name.startswith(self._prefixes) and id(tensor) not in skip]  # fmt: skip

    def _load(self, names, device: torch.device | None = None) -> None:
        for name in list(names):
            tensor = self.names.get(name, self._shapes[name])
            check_finite(name, tensor)
            # A copy in aligned memory: BLAS may round differently for another alignment, and the
            # place of a tensor in its file must not change a result.
            tensor = tensor.to(device or self.device, self.dtype, copy=True)
            skeleton.assign(self.model, name, tensor)
        self.model.tie_weights()

    def _free(self, names) -> None:
        for name in list(names):
            empty = torch.empty(self._shapes[name], dtype=self.dtype, device="meta")
            skeleton.assign(self.model, name, empty)
        self.model.tie_weights()

    def _returns_tuple(self, batch: torch.Tensor) -> bool:
        """Whether a block returns a tuple, which the code around it then indexes: one real call of
        block 0, on one row, is the only way to know."""
        found: list = []

        def first(i: int, states: torch.Tensor, call: dict):
            found.append((states, call))
            raise Recorded

        with replaced(self.blocks, first), suppress(Recorded):
            self.model(input_ids=batch[:1, :2].to(self.device), use_cache=False)
        loaded = next(self.blocks[0][1].parameters()).device.type != "meta"
        if not loaded:
            self.load_block(0)
        output = self._call(0, *found[0])
        if not loaded:
            self.free_block(0)
        return isinstance(output, tuple)
