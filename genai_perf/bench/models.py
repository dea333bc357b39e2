"""Whole models side by side: prefill, decode, time to the first token, a training step, memory.

The first checkpoint is the baseline; with `patch`, it stands beside itself with our attention.
Batch sizes double until memory ends: the largest one that fits is a result. Each batch is tried in
a fresh process first, whose peak is the row's memory, so that running out of it ends that process
and not the run.
"""

import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import results
from .clocks import timer_for
from .generation import decode_call, prefill_call
from .memory import FreshProcesses
from .provenance import provenance
from .roofline import Peaks, measure_peaks
from .runner import Settings
from .trace import pinned
from .verdict import Measured, measure

PATCHED = "patched"
DECODE_STEPS = 16
# No try takes more than this share of the memory that is free when the run begins.
_SHARE = 0.8
_MOST_DOUBLINGS = 12
_PRELOAD = ("torch", "transformers", "transformers.modeling_utils", "genai_perf.nn",
            "genai_perf.integrations.transformers", "genai_perf.bench.models")  # fmt: skip
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class _Model:
    name: str
    path: Path
    patched: bool


def run(folders: Sequence[Path], settings: Settings, *, batches: Sequence[int] = (),
        lengths: Sequence[int] = (), patch: bool = True, limit_bytes: int | None = None,
        progress: Progress | None = None) -> dict:  # fmt: skip
    """Measure checkpoints, dense or compressed, the first one as the baseline.

    Args:
        folders: checkpoint folders.
        settings: device, threads, budget of a row, quick.
        batches: batch sizes; none: doubling from 1 until memory ends.
        lengths: prompt tokens; none: 128 and 512, or what the model takes; quick: 128.
        patch: whether the first checkpoint is also measured after `genai_perf.patch`.
        limit_bytes: what a try may take; None: 80 % of the free memory.
        progress: called with (stage, done, total, what).

    Returns:
        dict: a valid report (`results.validate`) whose `models` hold the rows.

    Raises:
        CheckpointError, ValueError: a folder that is no checkpoint; names used twice.
    """
    clock = results.Clock()
    progress = progress or (lambda stage, done, total, what: None)
    models = [_Model(folder.resolve().name, folder, False) for folder in folders]
    if patch:
        models.insert(1, _Model(f"{models[0].name}, {PATCHED}", folders[0], True))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"bench run model: folders must have different names, got {names}")
    limit = limit_bytes or int(_SHARE * _free(settings.device))
    with pinned(settings.threads, pin=settings.pin):
        settings = replace(settings, threads=torch.get_num_threads())
        about = provenance(settings.device)
        peaks = measure_peaks(settings.device, (torch.float32,))
        rows = []
        with FreshProcesses(preload=_PRELOAD) as fresh:
            longest = _positions(folders[0])
            chosen = lengths or ((128,) if settings.quick else (128, 512))
            chosen = [n for n in chosen if n + DECODE_STEPS <= longest] or [longest - DECODE_STEPS]
            for length in chosen:
                for batch, tried in _batches(models, length, batches, fresh, settings, limit):
                    progress("Models", len(rows), 0, f"batch {batch}, {length} tokens")
                    rows += _rows(models, batch, length, tried, settings, peaks)
    return clock.report(about, asdict(settings) | {"decode_steps": DECODE_STEPS,
                                                   "limit_bytes": limit},
                        peaks=peaks.to_dict(), models=rows)  # fmt: skip


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _positions(folder: Path) -> int:
    from ..io.checkpoints import Checkpoint

    config = Checkpoint(folder).config
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)


def _batches(models: list[_Model], length: int, batches: Sequence[int], fresh: FreshProcesses,
             settings: Settings, limit: int):  # fmt: skip
    """(batch, name -> what a fresh process found or why it ended), while anything fits."""
    most = 2 if settings.quick else _MOST_DOUBLINGS
    for batch in batches or (2**i for i in range(most + 1)):
        tried = {}
        for model in models:
            try:
                tried[model.name] = fresh.run("genai_perf.bench.models:try_batch", {
                    "path": str(model.path), "patched": model.patched, "batch": batch,
                    "length": length, "limit": limit, "threads": settings.threads,
                    "device": settings.device,
                }).value  # fmt: skip
            except RuntimeError as error:
                said = str(error)
                full = any(word in said for word in ("allocate memory", "out of memory", "SIGKILL",
                                                     "MemoryError"))  # fmt: skip
                tried[model.name] = {"status": "out of memory" if full else "error",
                                     "reason": " ".join(said.split())[-300:]}  # fmt: skip
        yield batch, tried
        if not any("peak" in found for found in tried.values()):
            return


def try_batch(path: str, patched: bool, batch: int, length: int, limit: int, threads: int,
              device: str) -> dict:  # fmt: skip
    """Load a model, prefill one batch and decode some tokens within `limit` bytes, in this process.

    Returns:
        dict: `peak`, bytes: resident ones, on a GPU those of torch's allocator.
    """
    torch.set_num_threads(threads)
    if device == "cpu":
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
    model = load(Path(path), patched, device)
    ids = _prompt(model, batch, length)
    prefill_call(model, ids)()
    decode_call(model, ids, DECODE_STEPS)()
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated()}
    unit = 1024 if Path("/proc").exists() else 1
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def load(path: Path, patched: bool = False, device: str = "cpu") -> nn.Module:
    """A checkpoint, dense or compressed, computing in float32 on the CPU, in its dtype on a GPU."""
    from ..integrations.transformers import load_compressed

    model = load_compressed(path, dtype=torch.float32 if device == "cpu" else None).to(device)
    if patched:
        from ..integrations.patching import patch

        patch(model)
    return model.eval()


def _prompt(model: nn.Module, batch: int, length: int) -> Tensor:
    """Random tokens: what is measured does not depend on them."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.buffers(), next(model.parameters())).device)


def _rows(models: list[_Model], batch: int, length: int, tried: dict, settings: Settings,
          peaks: Peaks) -> list[dict]:  # fmt: skip
    ready = [model for model in models if "peak" in tried[model.name]]
    loaded = {m.name: load(m.path, m.patched, settings.device) for m in ready}
    found: dict[str, Measured] = {}
    if loaded:
        ids = _prompt(next(iter(loaded.values())), batch, length)
        found["prefill"] = _timed({n: prefill_call(m, ids) for n, m in loaded.items()}, settings)
        found["decode"] = _timed({n: decode_call(m, ids, DECODE_STEPS) for n, m in loaded.items()},
                                 settings)  # fmt: skip
        if steps := _training(loaded, ids):
            found["train"] = _timed(steps, settings)
    rows = []
    for model in models:
        row = {"variant": model.name, "batch": batch, "length": length, "status": "ok",
               "reason": None, "decode_steps": DECODE_STEPS}  # fmt: skip
        if model.name not in loaded:
            rows.append(row | tried[model.name])
            continue
        rows.append(row | _numbers(model.name, loaded, found, batch, length, peaks)
                    | {"peak_bytes": tried[model.name]["peak"]})  # fmt: skip
    return rows


def _timed(calls: dict[str, Callable[[], object]], settings: Settings) -> Measured:
    return measure(calls, timer=timer_for(settings.device, settings.timer), pairs=settings.pairs,
                   budget_seconds=settings.budget_seconds, warmup_seconds=0.0,
                   stable_seconds=1.0)  # fmt: skip


def _training(loaded: dict[str, nn.Module], ids: Tensor) -> dict[str, Callable[[], object]]:
    """A step of AdamW for the models whose weights are all dense."""
    from ..nn import QuantLinear

    steps = {}
    for name, model in loaded.items():
        if not any(isinstance(module, QuantLinear) for module in model.modules()):
            steps[name] = training_step(model, ids)
    return steps


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """Forward with the loss, backward and AdamW, on copies of nothing: the weights move."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.enable_grad():
            logits = model(ids).logits[:, :-1].float()
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_flops(model: nn.Module, batch: int, length: int) -> int:
    """6 flops a weight of the matmuls and a token, and 12 a layer, a hidden unit and a pair of
    tokens that causal attention keeps (half of all): what PaLM's MFU counts (arXiv 2204.02311,
    appendix B)."""
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight)  # fmt: skip
    weights = sum(p.numel() for p in model.parameters()) - (0 if tied else embeddings)
    pairs = length * length // 2
    attention = 12 * config.num_hidden_layers * config.hidden_size * pairs
    return batch * (6 * weights * length + attention)


def _numbers(name: str, loaded: dict, found: dict[str, Measured], batch: int, length: int,
             peaks: Peaks) -> dict:  # fmt: skip
    first = next(iter(loaded))
    prefill, decode = (found[phase].samples[name] for phase in ("prefill", "decode"))
    step = found["train"].samples.get(name) if "train" in found else None
    flops = training_flops(loaded[name], batch, length) if step else None
    return {
        "prefill_tokens_per_s": batch * length / prefill.median,
        "decode_tokens_per_s": batch * DECODE_STEPS / decode.median,
        # The prompt's pass ends with the logits of the first token.
        "first_token_seconds": prefill.median,
        "train_step_seconds": step.median if step else None,
        "mfu": flops / step.median / max(peaks.matmul.values()) if step else None,
        "prefill": _pair(found["prefill"], first, name),
        "decode": _pair(found["decode"], first, name),
        "train": _pair(found["train"], first, name) if step and first in found["train"].samples
        else None,
        "seconds": {phase: list(m.samples[name].seconds) for phase, m in found.items()
                    if name in m.samples},
    }  # fmt: skip


def _pair(found: Measured, baseline: str, candidate: str) -> dict | None:
    if baseline == candidate:
        return None
    one = found.pair(baseline, candidate)
    return {"baseline": baseline, "candidate": candidate, "ratio": one.pair.ratio,
            "low": one.pair.low, "high": one.pair.high, "pairs": one.pair.pairs,
            "verdict": str(one.verdict), "reason": one.reason}  # fmt: skip
