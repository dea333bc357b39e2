"""Whole models side by side: prefill, decode, time to the first token, a training step, memory.

The first checkpoint is the baseline; with `patch`, it stands beside itself with our attention.
Batch sizes double until memory ends: the largest one that fits is a result. Each batch is tried in
a fresh process first, whose peak is the row's memory, so that running out of it ends that process
and not the run.
"""

import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..io.checkpoints import Checkpoint
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

    With `settings.total_seconds`, no batch begins later than that; what is left out is named.

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
    # The rounds hold all models at once, a try only its own.
    held = sum(Checkpoint(folder).nbytes for folder in folders)
    limit = limit_bytes or int(_SHARE * _free(settings.device)) - 2 * held
    with pinned(settings.threads, pin=settings.pin):
        settings = replace(settings, threads=torch.get_num_threads())
        about = provenance(settings.device)
        peaks = measure_peaks(settings.device, (torch.float32,))
        rows, left_out = [], []
        with FreshProcesses(preload=_PRELOAD) as fresh:
            longest = _positions(folders[0])
            chosen = lengths or ((128,) if settings.quick else (128, 512))
            chosen = [n for n in chosen if n + DECODE_STEPS <= longest] or [longest - DECODE_STEPS]
            for length in chosen:
                for batch, tried in _batches(models, length, batches, fresh, settings, limit):
                    progress("Models", len(rows), 0, f"batch {batch}, {length} tokens")
                    rows += _rows(models, batch, length, tried, settings, peaks)
                    if (settings.total_seconds or math.inf) < clock.spent():
                        left_out.append(f"{length} tokens, batches above {batch}")
                        break
    return clock.report(about, asdict(settings) | {"decode_steps": DECODE_STEPS,
                                                   "limit_bytes": limit},
                        peaks=peaks.to_dict(), models=rows, left_out=left_out)  # fmt: skip


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _positions(folder: Path) -> int:
    config = Checkpoint(folder).config
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)


def _batches(models: list[_Model], length: int, batches: Sequence[int], fresh: FreshProcesses,
             settings: Settings, limit: int):  # fmt: skip
    """(batch, (name, work) -> what a fresh process found or why it ended), while anything fits.

    Once a model's training did not fit, no larger batch of it is tried.
    """
    most = 2 if settings.quick else _MOST_DOUBLINGS
    ended: dict[str, dict] = {}
    for batch in batches or (2**i for i in range(most + 1)):
        tried = {}
        for model in models:
            for work in ("use", "train"):
                arguments = {"path": str(model.path), "patched": model.patched, "batch": batch,
                             "length": length, "limit": limit, "threads": settings.threads,
                             "device": settings.device, "work": work}  # fmt: skip
                if work == "train" and "peak" not in tried[model.name, "use"]:
                    found = tried[model.name, "use"]
                elif work == "train" and model.name in ended:
                    found = ended[model.name]
                else:
                    found = _try(fresh, arguments)
                if work == "train" and "peak" not in found:
                    ended[model.name] = found
                tried[model.name, work] = found
        yield batch, tried
        if not any("peak" in found for found in tried.values()):
            return


def _try(fresh: FreshProcesses, arguments: dict) -> dict:
    try:
        return fresh.run("genai_perf.bench.models:try_batch", arguments).value
    except RuntimeError as error:
        return {"status": "out of memory" if out_of_memory(str(error)) else "error",
                "reason": " ".join(str(error).split())[-300:]}  # fmt: skip


def out_of_memory(said: str) -> bool:
    """Whether that is how a process or a call ends that finds no memory."""
    words = ("allocate memory", "out of memory", "SIGKILL", "MemoryError")
    return any(word in said for word in words)


def try_batch(path: str, patched: bool, batch: int, length: int, limit: int, threads: int,
              device: str, work: str) -> dict:  # fmt: skip
    """Load a model and, within `limit` bytes in this process, "use" it (prefill one batch, decode
    some tokens) or "train" it for a step.

    Returns:
        dict: `peak`, bytes: resident ones, on a GPU those of torch's allocator; or `status`
        "skipped" with the reason: a compressed model is not trained.
    """
    torch.set_num_threads(threads)
    if device == "cpu":
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
    model = load(Path(path), patched, device)
    ids = _prompt(model, batch, length)
    if work == "use":
        prefill_call(model, ids)()
        decode_call(model, ids, DECODE_STEPS)()
    elif not trainable(model):
        return {"status": "skipped", "reason": "its weights are compressed"}
    else:
        training_step(model, ids)()
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
    ready = [model for model in models if "peak" in tried[model.name, "use"]]
    loaded = {m.name: load(m.path, m.patched, settings.device) for m in ready}
    found: dict[str, Measured] = {}
    if loaded:
        ids = _prompt(next(iter(loaded.values())), batch, length)
        found["prefill"] = _timed({n: prefill_call(m, ids) for n, m in loaded.items()}, settings)
        found["decode"] = _timed({n: decode_call(m, ids, DECODE_STEPS) for n, m in loaded.items()},
                                 settings)  # fmt: skip
        steps = {name: training_step(model, ids) for name, model in loaded.items()
                 if "peak" in tried[name, "train"]}  # fmt: skip
        if steps:
            found["train"] = _timed(steps, settings)
    rows = []
    for model in models:
        row = {"variant": model.name, "batch": batch, "length": length, "status": "ok",
               "reason": None, "decode_steps": DECODE_STEPS}  # fmt: skip
        if model.name not in loaded:
            rows.append(row | tried[model.name, "use"])
            continue
        train = tried[model.name, "train"]
        rows.append(row | _numbers(model.name, loaded, found, batch, length, peaks)
                    | {"peak_bytes": tried[model.name, "use"]["peak"],
                       "train_peak_bytes": train.get("peak"),
                       "train_reason": train.get("reason")})  # fmt: skip
    return rows


def _timed(calls: dict[str, Callable[[], object]], settings: Settings) -> Measured:
    return measure(calls, timer=timer_for(settings.device, settings.timer), pairs=settings.pairs,
                   budget_seconds=settings.budget_seconds, warmup_seconds=0.0,
                   stable_seconds=1.0)  # fmt: skip


def trainable(model: nn.Module) -> bool:
    """Whether all of its weights are dense."""
    from ..nn import QuantLinear, SparseLinear

    return not any(isinstance(module, (QuantLinear, SparseLinear)) for module in model.modules())


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
