"""Ways to fit training on one device, alone and together: samples a second and peak memory.

Every way trains the same model on the same tokens for the same number of steps, each in a fresh
process. A way that needs what is not installed, or what this device lacks, is skipped by name.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..optim import AdamW8bit
from . import results
from .memory import FreshProcesses
from .models import _PRELOAD, _free, load, out_of_memory
from .problem import choose
from .provenance import provenance
from .runner import Settings
from .trace import pinned

# name -> the ways that are on together
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "gradient accumulation": ("accumulate",),
    "gradient checkpointing": ("checkpoint",),
    "bf16 autocast": ("autocast",),
    "8-bit optimizer": ("optimizer8",),
    "8-bit optimizer, bitsandbytes'": ("optimizer8", "bitsandbytes"),
    "LoRA": ("lora",),
    "LoRA, peft's": ("lora", "peft"),
    "QLoRA (nf4)": ("lora", "nf4"),
    "torch.compile": ("compile",),
    "our attention": ("patch",),
    "Liger kernels": ("liger",),
    "accumulation + checkpointing": ("accumulate", "checkpoint"),
    "accumulation + checkpointing + 8-bit optimizer": ("accumulate", "checkpoint", "optimizer8"),
    "QLoRA + accumulation + checkpointing": ("lora", "nf4", "accumulate", "checkpoint"),
    "QLoRA + accumulation + checkpointing + our attention": (
        "lora", "nf4", "accumulate", "checkpoint", "patch"),
}  # fmt: skip
# What a way imports, which is no memory of the training itself; the package, if it is another's.
_NEEDS = {"bitsandbytes": "bitsandbytes", "liger": "liger_kernel", "peft": "peft"}
_MODULES = {"bitsandbytes": "bitsandbytes.optim", "liger": "liger_kernel.transformers",
            "peft": "peft", "compile": "torch._inductor.compile_fx"}  # fmt: skip
_SHARE = 0.8
_RANK = 8
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Work:
    """What each way does: `steps` optimizer steps (the first not timed) of `batch` samples of
    `length` tokens, `micro` of them at once where gradients are accumulated."""

    batch: int = 8
    micro: int = 2
    length: int = 128
    steps: int = 4
    lr: float = 1e-4


def run(folder: Path, settings: Settings, *, work: Work | None = None, ways: Sequence[str] = (),
        progress: Progress | None = None) -> dict:  # fmt: skip
    """Train one checkpoint each way.

    Args:
        folder: dense checkpoint.
        settings: device and threads.
        work: how much; None: Work().
        ways: names of WAYS; none: all.
        progress: called with (stage, done, total, what).

    Returns:
        dict: a valid report (`results.validate`) whose `training` holds a row for each way: status,
        samples_per_s, peak_bytes, loss (of the last step).

    Raises:
        CheckpointError: no dense checkpoint.
        ValueError: an unknown way; offers the nearest.
    """
    from ..io.checkpoints import Checkpoint

    clock = results.Clock()
    progress = progress or (lambda stage, done, total, what: None)
    Checkpoint(folder)
    chosen = [choose("way to train", name, list(WAYS)) for name in ways] or list(WAYS)
    work, rows = work or Work(), []
    limit = int(_SHARE * _free(settings.device))
    with pinned(settings.threads, pin=settings.pin), FreshProcesses(preload=_PRELOAD) as fresh:
        settings = replace(settings, threads=torch.get_num_threads())
        for name in chosen:
            progress("Ways to train", len(rows), len(chosen), name)
            reason = why_not(name, settings.device)
            if reason is not None:
                rows.append({"name": name, "status": "skipped", "reason": reason})
                continue
            arguments = {"path": str(folder), "name": name, "device": settings.device}
            arguments |= {"threads": settings.threads, "limit": limit, "work": asdict(work)}
            try:
                found = fresh.run("genai_perf.bench.training:train", arguments)
            except RuntimeError as error:
                status = "out of memory" if out_of_memory(str(error)) else "error"
                reason = " ".join(str(error).split())[-300:]
                rows.append({"name": name, "status": status, "reason": reason})
                continue
            rows.append({"name": name, "status": "ok", "reason": None} | found.value)
        progress("Ways to train", len(chosen), len(chosen), "")
    return clock.report(provenance(settings.device),
                        asdict(settings) | {"work": asdict(work), "model": folder.resolve().name},
                        training=rows)  # fmt: skip


def why_not(name: str, device: str) -> str | None:
    """Why a way cannot run here, in one sentence, or None."""
    on = WAYS[name]
    for part in on:
        if part in _NEEDS and find_spec(_NEEDS[part]) is None:
            return f"{_NEEDS[part]} is not installed"
    if "liger" in on and device == "cpu":
        return "Liger's kernels need a GPU"
    return None


def train(path: str, name: str, device: str, threads: int, limit: int, work: dict) -> dict:
    """Train one way in this process.

    Returns:
        dict: samples_per_s, loss, peak_bytes (of torch's allocator on a GPU, else resident), and
        own_bytes, the part of the peak that came after the imports: model, gradients, optimizer.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for part in WAYS[name]:
        if part in _MODULES:
            import_module(_MODULES[part])
    before = psutil.Process().memory_info().rss if device == "cpu" else 0
    if device == "cpu":
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
    on, todo = set(WAYS[name]), Work(**work)
    model = load(Path(path), "patch" in on, device).train()
    # As in transformers' Trainer: weights that train are float32, also under autocast.
    vocabulary = model.get_input_embeddings().num_embeddings
    parameters = _prepare(model, on)
    optimizer = _optimizer(parameters, on, todo.lr)
    called = torch.compile(model) if "compile" in on else model
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocabulary, (todo.batch, todo.length), generator=generator)
               for _ in range(todo.steps)]  # fmt: skip
    seconds, loss = [], math.nan
    for ids in batches:
        start = time.perf_counter()
        loss = _step(called, optimizer, ids.to(device), on, todo)
        seconds.append(time.perf_counter() - start)
    timed = seconds[1:] or seconds
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1024 if Path("/proc").exists() else 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"samples_per_s": todo.batch * len(timed) / sum(timed), "peak_bytes": peak,
            "own_bytes": peak - before, "loss": loss, "seconds": seconds,
            "trained_parameters": sum(p.numel() for p in parameters)}  # fmt: skip


def _step(model: nn.Module, optimizer, ids: Tensor, on: set[str], todo: Work) -> float:
    parts = ids.split(todo.micro) if "accumulate" in on else (ids,)
    total = 0.0
    for part in parts:
        kind = part.device.type
        with torch.autocast(kind, torch.bfloat16) if "autocast" in on else nullcontext():
            logits = model(part, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
        (loss * (len(part) / len(ids))).backward()
        total += loss.item() * len(part) / len(ids)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _prepare(model: nn.Module, on: set[str]) -> list[nn.Parameter]:
    """The model made ready; gives the parameters that train."""
    if "checkpoint" in on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "liger" in on:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    if "lora" not in on:
        model.requires_grad_(True)
        return list(model.parameters())
    if "nf4" in on:
        from ..nn import quantize_model

        quantize_model(model, "nf4")
    model.requires_grad_(False)
    if "peft" in on:
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear"))
        return [p for p in model.parameters() if p.requires_grad]
    return list(add_lora(model, _RANK))


class LowRank(nn.Module):
    """y = inner(x) + x A^T B^T: LoRA without scaling or dropout (arXiv 2106.09685), also around our
    quantized layers; peft's own stands beside it in the table."""

    def __init__(self, inner: nn.Module, in_features: int, out_features: int, rank: int,
                 device: torch.device):  # fmt: skip
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(rank, in_features, device=device) / in_features**0.5)
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return self.inner(x) + low


def add_lora(model: nn.Module, rank: int) -> Iterator[nn.Parameter]:
    """Put LowRank around every linear layer but the head; gives its parameters."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is head or not hasattr(module, "in_features"):
            continue
        device = next(iter([*module.parameters(), *module.buffers()])).device
        adapter = LowRank(module, module.in_features, module.out_features, rank, device)
        model.set_submodule(name, adapter)
        yield adapter.a
        yield adapter.b


def _optimizer(parameters: list[nn.Parameter], on: set[str], lr: float):
    if "bitsandbytes" in on:
        return import_module("bitsandbytes.optim").AdamW8bit(parameters, lr=lr)
    if "optimizer8" in on:
        return AdamW8bit(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr)
