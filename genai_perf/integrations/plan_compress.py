"""What a compression will take, before it runs: memory, disk and time."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .. import formats
from .._checks import check_choice, check_positive
from ..compression.apply import BATCH_TOKENS
from ..compression.layer import fitting_group_size
from ..compression.recipe import Recipe
from ..compression.steps import GPTQ, SparseGPT
from ..io.checkpoints import Checkpoint
from . import skeleton
from .fake import LiveBytes, without_data

# glibc keeps freed blocks of up to 32 MB: 0.2 GB more than was alive, measured on x86-64 Linux over
# int8, int4 and SparseGPT runs of a 1024-wide model.
_KEPT_BY_ALLOCATOR = 200_000_000


@dataclass(frozen=True)
class CompressionPlan:
    """An estimate.

    Attributes:
        memory: peak resident bytes above those of the interpreter and its libraries.
        parts: what is in memory at that moment, by name.
        disk: bytes that dst needs while it is written.
        nbytes_before, nbytes_after: of the checkpoint's tensors.
        seconds: on this machine, at the matmul rate measured now.
    """

    memory: int
    parts: dict[str, int]
    disk: int
    nbytes_before: int
    nbytes_after: int
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)


def plan_compression(
    src: str | Path,
    recipe: Recipe | str,
    *,
    n_samples: int = 128,
    max_seqlen: int | None = None,
    activations: str = "memory",
    n_heldout: int = 0,
) -> CompressionPlan:
    """Memory, disk and time of `compress` on this CPU, from headers and config.

    Args:
        src, recipe, n_samples, max_seqlen, activations: as in `compress`; the calibration is taken
            to have n_samples windows where the recipe needs one.
        n_heldout: windows of held-out text that the result is compared on, at most 256 tokens each.

    Raises:
        CheckpointError: see `Checkpoint`.
        ValueError: a recipe that is not one.
    """
    recipe = Recipe.of(recipe)
    check_choice("plan", "activations", activations, ("memory", "disk"))
    check_positive("plan", n_samples=n_samples)
    checkpoint = Checkpoint(src)
    model = skeleton.build(checkpoint, torch.float32)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    seqlen = min(2048, limit) if max_seqlen is None else max_seqlen
    tokens = n_samples * seqlen if recipe.needs_calibration else 0
    hidden = model.get_input_embeddings().embedding_dim
    dtype = skeleton.stored_dtype(checkpoint)
    blocks = [_Block(prefix, block, recipe, dtype)
              for prefix, block in skeleton.find_blocks(model)]  # fmt: skip
    step = min(tokens, max(1, BATCH_TOKENS // seqlen) * seqlen)
    forward, inputs = _forward(model, step, seqlen) if tokens else (0, {})
    worst = max(blocks, key=lambda b: b.nbytes)
    hessians = sum(4 * k * k for k in inputs.get(worst.prefix, ()))
    layer_inputs = 0 if activations == "disk" else 4 * hidden * tokens
    work = max(forward, worst.output + worst.solver if tokens else worst.output)
    parts = {"block": worst.nbytes, "hessians": hessians, "layer inputs": layer_inputs,
             "work": work, "kept by the allocator": _KEPT_BY_ALLOCATOR}  # fmt: skip
    embedding = 4 * model.get_input_embeddings().weight.numel() + layer_inputs if tokens else 0
    if embedding > sum(parts.values()):
        parts = {"embedding": embedding - layer_inputs, "layer inputs": layer_inputs,
                 "kept by the allocator": _KEPT_BY_ALLOCATOR}  # fmt: skip
    measuring = _quality(model, n_heldout, min(256, seqlen), worst.nbytes)
    if sum(measuring.values()) > sum(parts.values()):
        parts = measuring
    outside = checkpoint.nbytes - sum(b.stored for b in blocks)
    after = outside + sum(b.output for b in blocks)
    on_disk = after + (4 * hidden * tokens if activations == "disk" else 0)
    flops = sum(b.flops(tokens, inputs.get(b.prefix, ())) for b in blocks)
    seconds = flops / _rate() + 3 * checkpoint.nbytes / 1e9  # read thrice, at 1 GB/s
    return CompressionPlan(sum(parts.values()), parts, on_disk, checkpoint.nbytes, after, seconds)


def _quality(model: nn.Module, windows: int, seqlen: int, block: int) -> dict[str, int]:
    """What `compression.quality.measure` holds at its end, by name; nothing for no windows."""
    head = model.get_output_embeddings()
    if not windows or head is None:
        return {}
    matrices = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), head)}
    vocabulary, hidden = head.weight.shape
    return {
        # The head's block is block 0 again: one call of it says how the model's code takes it.
        "embedding and head": 4 * sum(matrices.values()) + block,
        "layer inputs": 2 * 4 * windows * seqlen * hidden,
        "held-out logits": 5 * 4 * seqlen * vocabulary,
        "kept by the allocator": _KEPT_BY_ALLOCATOR,
    }


class _Block:
    """The linears of one block and what the recipe makes of them."""

    def __init__(self, prefix: str, block: nn.Module, recipe: Recipe, dtype: torch.dtype):
        self.prefix, self._dtype = prefix, dtype
        self.names = {f"{prefix}.{name}": t for name, t in block.named_parameters()}
        self.linears = [
            (*_rows(m), recipe.for_layer(f"{prefix}.{name}"))
            for name, m in block.named_modules()
            if skeleton.is_linear(m) and not recipe.skips(f"{prefix}.{name}")
        ]
        self.nbytes = sum(4 * t.numel() for t in self.names.values())
        self.stored = sum(t.numel() for t in self.names.values()) * dtype.itemsize
        dense = self.stored - dtype.itemsize * sum(n * k for n, k, _ in self.linears)
        self.output = dense + sum(self._packed(*linear) for linear in self.linears)

    def _packed(self, n: int, k: int, recipe: Recipe) -> int:
        quantizer = recipe.quantizer
        if quantizer is None:
            return self._dtype.itemsize * n * k
        form = formats.get(quantizer.format)
        options = {}
        if quantizer.grouped:
            size = 128 if quantizer.group_size is None else quantizer.group_size
            options = {"group_size": fitting_group_size(k, size), "scale_dtype": self._dtype}
        elif form.name == "nf4":
            options = {"double_quant": quantizer.double_quant}
        layout = form.layout((n, k), form.spec(**options))
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())

    @property
    def solver(self) -> int:
        """fp32 copies of the largest layer's weights and of its Hessian, all alive in the sweep."""
        return max((4 * (5 * n * k + 3 * k * k) for n, k, _ in self.linears), default=0)

    def flops(self, tokens: int, inputs) -> float:
        weights = sum(t.numel() for t in self.names.values())
        total = 2 * 2 * weights * tokens + sum(2 * k * k * tokens for k in inputs)
        for n, k, recipe in self.linears:
            if any(isinstance(step, GPTQ | SparseGPT) for step in recipe.steps):
                total += 2 * n * k * k + 2 * k**3
        return total


def _rows(linear: nn.Module) -> tuple[int, int]:
    n, k = linear.weight.shape
    return (k, n) if skeleton.is_conv1d(linear) else (n, k)


def _forward(model: nn.Module, tokens: int, seqlen: int) -> tuple[int, dict[str, list[int]]]:
    """Peak bytes of one block's forward pass over `tokens`, and the widths of the distinct inputs
    of its linears, by block."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs: dict[str, list[int]] = {}
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        without_data(model, mode)
        live = LiveBytes()
        live.ignore((*model.parameters(), *model.buffers()))
        peaks = []
        for prefix, block in skeleton.find_blocks(model):
            _watch(block, inputs.setdefault(prefix, []))
            block.register_forward_pre_hook(lambda *_: _restart(live))
            block.register_forward_hook(lambda *_: peaks.append(live.peak - live.start))
        ids = torch.zeros(max(1, tokens // seqlen), seqlen, dtype=torch.long)
        with live:
            model.base_model(input_ids=ids, use_cache=False)
    return max(peaks), inputs


def _restart(live: LiveBytes) -> None:
    live.start = live.peak = live.live


def _watch(block: nn.Module, widths: list[int]) -> None:
    last: list = []

    def hook(module, args):
        if not last or last[0] is not args[0]:
            last[:] = [args[0]]
            widths.append(args[0].shape[-1])

    for module in block.modules():
        if skeleton.is_linear(module):
            module.register_forward_pre_hook(hook)


def _rate() -> float:
    """Floating-point operations a second of a matmul of this size here, fp32."""
    a = torch.randn(512, 512)
    times: Iterator[float] = (_seconds(a) for _ in range(8))
    return 2 * 512**3 / sorted(times)[3]


def _seconds(a: torch.Tensor) -> float:
    started = time.perf_counter()
    a @ a
    return time.perf_counter() - started
