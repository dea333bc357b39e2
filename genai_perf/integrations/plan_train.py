"""The memory of loading and training a checkpoint, before anything is loaded.

One forward and backward pass of the model's own code runs on tensors without data (torch's fake
tensors), and every byte that the pass would allocate or free is counted: no formula per
architecture, and gradient checkpointing, attention kernels and loss are what they are.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .. import formats
from .._checks import check_choice, check_positive, fail
from ..io.checkpoints import Checkpoint
from . import skeleton
from .fake import LiveBytes, without_data

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK8 = 256  # elements that share one fp32 scale in an 8-bit optimizer state
_STATE8 = 1 + 4 / _BLOCK8
# Optimizer states for each trained parameter: how many, and bytes of one; None: those of the
# parameter, as torch's optimizers have it.
OPTIMIZERS = {"adamw": (2, None), "adamw8bit": (2, _STATE8), "lion": (1, None),
              "lion8bit": (1, _STATE8), "sgd-momentum": (1, None), "sgd": (0, None)}  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes on each device.

    Attributes:
        weights: parameters and buffers, sharded where asked.
        gradients: of the trained parameters, sharded.
        optimizer: its states, sharded.
        gathered: under sharding, the two largest decoder blocks in full, which are computed and
            fetched at the same time.
        activations: what the forward pass leaves for the backward pass.
        temporary: what the pass needs at its highest beyond all of these.
        peak: the highest of a training step.
        loading: the highest while the checkpoint is loaded.
        trained: parameters that are trained, and parameters in all.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    temporary: int
    peak: int
    loading: int
    trained: tuple[int, int]

    def to_dict(self) -> dict:
        return asdict(self)


class _LowRank(nn.Module):
    """A frozen linear layer with a trained product of two thin matrices beside it."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        rows, columns = base.weight.shape
        if skeleton.is_conv1d(base):
            rows, columns = columns, rows
        self.base = base
        self.down = nn.Linear(columns, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, rows, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def plan_training(
    src: str | Path,
    *,
    dtype: str = "fp32",
    autocast: bool = False,
    optimizer: str = "adamw",
    batch: int = 1,
    seqlen: int = 2048,
    shards: int = 1,
    gradient_checkpointing: bool = False,
    lora_rank: int | None = None,
    quantize: str | None = None,
) -> TrainingPlan:
    """The bytes of one training step of a checkpoint, from its config alone.

    Args:
        src: checkpoint folder; its weights are not read.
        dtype: of weights, gradients and activations: "fp32", "bf16" or "fp16".
        autocast: fp32 weights, bf16 activations (torch.autocast).
        optimizer: one of OPTIMIZERS.
        batch, seqlen: sequences and tokens of one micro-batch on each device.
        shards: devices over which weights, gradients and states are sharded (FSDP2, ZeRO 3).
        gradient_checkpointing: keep only the inputs of each decoder block.
        lora_rank: train a low-rank product beside each linear layer of the blocks, not the model.
        quantize: with lora_rank, the format of the frozen linear layers ("nf4": QLoRA).

    Raises:
        CheckpointError: the folder, or an architecture that is not known.
        ValueError: settings that clash.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    check_choice("plan", "dtype", dtype, tuple(DTYPES))
    check_choice("plan", "optimizer", optimizer, tuple(OPTIMIZERS))
    check_positive("plan", batch=batch, seqlen=seqlen, shards=shards)
    if quantize is not None and lora_rank is None:
        fail("plan", "quantize", "used with lora_rank: only a frozen weight is quantized", quantize)
    if autocast and dtype != "fp32":
        fail("plan", "dtype", "fp32 with autocast, which keeps master weights", dtype)
    model = skeleton.build(Checkpoint(src), DTYPES[dtype])
    mode = FakeTensorMode()
    with mode:
        without_data(model, mode)
        blocks = [block for _, block in skeleton.find_blocks(model)]
        if lora_rank is not None:
            _freeze(model, blocks, lora_rank)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora_rank is not None and gradient_checkpointing:
            model.enable_input_require_grads()
        model.train()
        step = _step(model, torch.zeros(batch, seqlen, dtype=torch.long), autocast)
    weights = _nbytes(model.parameters()) + _nbytes(model.buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _nbytes(trained)
    states, each = OPTIMIZERS[optimizer]
    states = int(sum(p.numel() * states * (each or p.itemsize) for p in trained))
    if quantize is not None:
        weights -= sum(_saved_by(linear, quantize) for linear in _bases(blocks))
    largest = max(p.nbytes for p in trained)
    gathered = sum(sorted(_nbytes(b.parameters()) for b in blocks)[-2:]) if shards > 1 else 0
    kept = (weights + gradients + states) // shards
    # Gradients grow while activations shrink; both are in the measured peak of the pass.
    in_pass = weights // shards + states // shards + gathered + step.peak
    in_pass -= gradients - gradients // shards
    in_step = kept + 2 * largest // shards
    peak = max(in_pass, in_step)
    temporary = max(0, peak - kept - gathered - step.activations)
    count = (sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters()))
    return TrainingPlan(
        weights // shards, gradients // shards, states // shards, gathered, step.activations,
        temporary, peak, weights // shards + largest, count,
    )  # fmt: skip


@dataclass(frozen=True)
class _Step:
    activations: int
    peak: int


def _step(model, ids, autocast: bool) -> _Step:
    """Bytes above the weights in one forward and backward pass, gradients among them."""
    live = LiveBytes()
    live.ignore((*model.parameters(), *model.buffers()))
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        activations = live.live
        loss.backward()
    return _Step(activations, live.peak)


def _freeze(model: nn.Module, blocks: list[nn.Module], rank: int) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in blocks:
        for name, module in list(block.named_modules()):
            if skeleton.is_linear(module):
                parent = block.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _LowRank(module, rank))


def _bases(blocks: list[nn.Module]) -> list[nn.Module]:
    return [m.base for block in blocks for m in block.modules() if isinstance(m, _LowRank)]


def _saved_by(linear: nn.Module, format: str) -> int:
    """Bytes that a linear layer's weight loses by being stored in `format`."""
    rows, columns = linear.weight.shape
    form = formats.get(format)
    layout = form.layout((rows, columns), form.spec())
    packed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    return linear.weight.nbytes - packed


def _nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)
