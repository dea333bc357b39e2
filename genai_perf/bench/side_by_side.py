"""A checkpoint and its compressed variants, measured side by side in one run: the demo's report.

Size on disk, perplexity, prefill and decode speed through the compressed path, peak memory in a
fresh process each, and one realistic layer per format.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from ..io.checkpoints import Checkpoint
from . import schema
from .captions import busy_warning, captions
from .evaluate import Quality, perplexity, windows
from .generation import decode_call, prefill_call
from .layer import time_layer
from .machine import Machine, commit, machine, versions
from .memory import FreshProcesses, Usage
from .timer import Samples, compare, interleave

RECIPES = (
    "int8-rtn", "fp8-rtn", "nf4-rtn", "int4-rtn", "int4-gptq",
    "sparsegpt-0.5", "sparsegpt-2:4", "sparsegpt-0.5+int4-gptq",
)  # fmt: skip
_LAYER_FORMATS = ("int8", "fp8", "nf4", "int4")
_PRELOAD = ("torch", "transformers", "transformers.modeling_utils", "genai_perf.nn",
            "genai_perf.integrations.transformers", "genai_perf.bench.generation")  # fmt: skip

Progress = Callable[[str, int, int], None]
# phase -> variant -> samples of the original and of the variant, taken in the same rounds
Timed = dict[str, dict[str, tuple[Samples, Samples]]]


@dataclass(frozen=True)
class Settings:
    """How much is measured; tokens and counts.

    window: tokens in a window of calibration, evaluation and prefill.
    eval_windows, calibration_windows: how many, spread over the text.
    decode_steps: tokens a decode sample generates.
    rounds, layer_rounds: samples of each variant.
    threads: of torch and the kernels; None: those of torch less the cores that other work keeps
        busy, because a thread that waits for its core makes all others wait.
    budget_seconds: for each of prefill, decode and the layer; large models get fewer rounds.
    """

    window: int = 256
    eval_windows: int = 96
    calibration_windows: int = 64
    decode_steps: int = 16
    rounds: int = 30
    layer_rounds: int = 30
    layer_features: int = 4096
    threads: int | None = None
    budget_seconds: float = 40.0

    @classmethod
    def quick(cls) -> "Settings":
        return cls(eval_windows=24, calibration_windows=16, decode_steps=8, rounds=5,
                   layer_rounds=5)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Documents and where they are from, in words for the report."""

    documents: tuple[str, ...]
    source: str


def measure(
    source: Path,
    work: Path,
    *,
    calibration: Text,
    evaluation: Text,
    recipes: Sequence[str] = RECIPES,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict:
    """Compress a checkpoint by every recipe and measure all variants beside the original.

    Args:
        source: dense checkpoint folder in Hugging Face format.
        work: an empty folder for the compressed checkpoints; they stay there.
        calibration: for the recipes that need it.
        evaluation: what perplexity is measured on.
        recipes: names known to `Recipe.named`.
        settings: amounts; the defaults suit a model of a few million parameters.
        progress: called with (stage, done, total).

    Returns:
        dict: a valid report (`schema.validate`).

    Raises:
        CheckpointError, CalibrationError, ValueError: bad input, in one sentence.
    """
    settings, progress = settings or Settings(), progress or (lambda stage, done, total: None)
    host, before = machine(), torch.get_num_threads()
    quiet = max(1, before - round(host.cores_busy))
    torch.set_num_threads(settings.threads or quiet)
    try:
        return _measure(source, work, calibration, evaluation, recipes, settings, progress,
                        replace(host, torch_threads=torch.get_num_threads()))  # fmt: skip
    finally:
        torch.set_num_threads(before)


def _measure(source: Path, work: Path, calibration: Text, evaluation: Text, recipes: Sequence[str],
             settings: Settings, progress: Progress, host: Machine) -> dict:  # fmt: skip
    started, begun = datetime.now(UTC), time.perf_counter()
    info, window, known, tokens = _prepare(source, calibration, evaluation, settings)
    paths, compressed = _compress(source, work, recipes, known, progress)
    together = _all_fit(paths)
    quality, seconds = _run(paths, tokens, together, settings, progress)
    memory = _memory(paths, tokens[0], settings, progress)
    layer = time_layer(
        _LAYER_FORMATS,
        in_features=settings.layer_features,
        out_features=settings.layer_features,
        rounds=settings.layer_rounds,
        budget_seconds=settings.budget_seconds,
        on_round=lambda done: progress("One large layer", done, 2 * settings.layer_rounds),
    )
    progress("One large layer", 2 * settings.layer_rounds, 2 * settings.layer_rounds)
    amounts = {
        "window": window,
        "calibration_windows": len(known),
        "calibration_source": calibration.source,
        "eval_windows": len(tokens),
        "evaluation_source": evaluation.source,
        "decode_steps": settings.decode_steps,
        "rounds": {phase: len(found["dense"][0].seconds) for phase, found in seconds.items()},
        "together": together,
        "compute_dtype": "float32",
        "layer_features": settings.layer_features,
        "layer_rounds": settings.layer_rounds,
    }
    tokens_a_call = {"prefill": window, "decode": settings.decode_steps}
    variants = [_variant(name, path, quality[name], seconds, tokens_a_call, memory[name],
                         compressed.get(name)) for name, path in paths.items()]  # fmt: skip
    report = {
        "schema_version": schema.VERSION,
        "kind": "demo",
        "created": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begun, 1),
        "commit": commit(),
        "versions": versions(),
        "machine": host.to_dict(),
        "model": info,
        "settings": {"busy": busy_warning(host)} | amounts | captions(amounts, info["parameters"]),
        "variants": variants,
        "layer": layer,
    }
    schema.validate(report)
    return report


def weight_bytes(folder: Path) -> int:
    """Bytes of the *.safetensors files that hold a checkpoint's weights."""
    checkpoint = Checkpoint(folder)
    return sum(p.stat().st_size for p in {checkpoint.info(n).file for n in checkpoint.names()})


def _prepare(source: Path, calibration: Text, evaluation: Text, settings: Settings
             ) -> tuple[dict, int, Tensor, Tensor]:  # fmt: skip
    """About the model; tokens in a window; windows for calibration and for evaluation."""
    from ..compression import calibration as text
    from ..integrations.transformers import CheckpointModel

    model = CheckpointModel(source)
    if model.tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer (tokenizer.json), which perplexity needs")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Decoding goes on after a window, and must stay within the model's positions.
    window = min(settings.window, (longest or settings.window + 64) - settings.decode_steps)

    def encode(one: str) -> list[int]:
        return model.tokenizer(one, verbose=False).input_ids

    known = text.windows(
        calibration.documents,
        encode,
        max_seqlen=window,
        n_samples=settings.calibration_windows,
        vocab_size=model.model.get_input_embeddings().num_embeddings,
    )
    ids = torch.tensor([token for one in evaluation.documents for token in encode(one)])
    if ids.numel() < window:
        raise ValueError(f"the evaluation text ({evaluation.source}) must have at least one window "
                         f"of {window} tokens, got {ids.numel()}")  # fmt: skip
    info = {
        "name": source.resolve().name,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "architecture": type(model.model).__name__,
        "stored_dtype": str(model.dtype).removeprefix("torch."),
    }
    return info, window, known, windows(ids, window, limit=settings.eval_windows)


def _compress(source: Path, work: Path, recipes: Sequence[str], known: Tensor, progress: Progress
              ) -> tuple[dict[str, Path], dict]:  # fmt: skip
    import genai_perf as gp

    paths, done = {"dense": source}, {}
    for i, name in enumerate(recipes):
        recipe = gp.Recipe.named(name)
        paths[name] = work / name.replace(":", "_")
        report = gp.compress(
            source,
            paths[name],
            recipe,
            calibration=known if recipe.needs_calibration else None,
            progress=lambda block, blocks, what, i=i: progress(
                "Compressing", i * blocks + block, len(recipes) * blocks
            ),
        )
        done[name] = {"recipe": recipe.to_dict(), "notes": _notes(report),
                      "seconds": report.seconds}  # fmt: skip
    return paths, done


def _notes(report) -> list[str]:
    """The notes of a compression, one for all layers that share it."""
    layers: dict[str, list[str]] = {}
    for layer in report.layers:
        for note in layer.notes:
            layers.setdefault(note, []).append(layer.name)
    shared = [f"{names[0]}: {note}" if len(names) == 1 else
              f"{len(names)} layers, the first {names[0]}: {note}"
              for note, names in layers.items()]  # fmt: skip
    return [*report.notes, *shared]


def _run(paths: dict[str, Path], tokens: Tensor, together: bool, settings: Settings,
         progress: Progress) -> tuple[dict[str, Quality], Timed]:  # fmt: skip
    """Perplexity of every variant, and prefill and decode samples in turn.

    Together, all variants are loaded at once and timed in one interleaved run; else one after the
    other takes turns with the original.
    """
    names = list(paths)
    quality: dict[str, Quality] = {}
    samples: Timed = {"prefill": {}, "decode": {}}
    groups = [names] if together else [["dense", name] for name in names[1:]]
    prompt = tokens[:1]
    total, rounds = len(names) * len(tokens), len(groups) * settings.rounds
    loaded: dict[str, nn.Module] = {}
    for turn, group in enumerate(groups):
        loaded = {name: model for name, model in loaded.items() if name in group}
        loaded |= {name: _load(paths[name]) for name in group if name not in loaded}
        for name in group:
            if name not in quality:
                before = len(quality) * len(tokens)
                quality[name] = perplexity(
                    loaded[name], tokens, batch_size=_batch_size(loaded[name], tokens),
                    on_batch=lambda n, before=before: progress("Perplexity", before + n, total),
                )  # fmt: skip
        for phase in ("prefill", "decode"):
            calls = {
                name: prefill_call(loaded[name], prompt) if phase == "prefill"
                else decode_call(loaded[name], prompt, settings.decode_steps)
                for name in group
            }  # fmt: skip
            stage, before = f"Timing {phase}", turn * settings.rounds
            timed = interleave(
                calls,
                rounds=settings.rounds,
                budget_seconds=settings.budget_seconds / len(groups),
                on_round=lambda n, stage=stage, before=before: progress(stage, before + n, rounds),
            )
            progress(stage, before + settings.rounds, rounds)  # also where the budget ended it
            samples[phase] |= {name: (timed["dense"], own) for name, own in timed.items()}
    return quality, samples


def _batch_size(model: nn.Module, tokens: Tensor) -> int:
    """Windows a call: at most 8, and logits of at most 128 MB."""
    logits = tokens.shape[1] * model.config.get_text_config().vocab_size
    return max(1, min(8, (1 << 25) // logits))


def _load(path: Path) -> nn.Module:
    from ..integrations.transformers import load_compressed

    return load_compressed(path, dtype=torch.float32).eval()


def _all_fit(paths: dict[str, Path]) -> bool:
    """Whether all variants fit into half of the free memory: twice their files, for dense weights
    in half precision are held in float32."""
    need = sum(2 * weight_bytes(path) for path in paths.values())
    return need < psutil.virtual_memory().available / 2


def _memory(paths: dict[str, Path], window: Tensor, settings: Settings, progress: Progress) -> dict:
    found = {}
    progress("Peak memory, fresh processes", 0, len(paths))
    with FreshProcesses(preload=_PRELOAD) as fresh:
        for name, path in paths.items():
            found[name] = fresh.run("genai_perf.bench.generation:memory_probe", {
                "path": str(path), "window": window.tolist(),
                "decode_steps": settings.decode_steps, "threads": torch.get_num_threads(),
            })  # fmt: skip
            progress("Peak memory, fresh processes", len(found), len(paths))
    return found


def _variant(name: str, path: Path, quality: Quality, timed: Timed, tokens_a_call: dict[str, int],
             memory: Usage, made: dict | None) -> dict:  # fmt: skip
    entry = {
        "name": name,
        "bytes_on_disk": weight_bytes(path),
        "peak_rss_bytes": memory.peak_rss_bytes,
        "baseline_rss_bytes": memory.baseline_rss_bytes,
        "perplexity": _finite(quality.perplexity),
        "nll": _finite(quality.nll),
        "window_nll": [_finite(value) for value in quality.window_nll],
        "compress_seconds": round(made["seconds"], 2) if made else None,
        "recipe": made["recipe"] if made else None,
        "notes": made["notes"] if made else [],
    }
    for phase, tokens in tokens_a_call.items():
        dense, own = timed[phase][name]
        pair = compare(dense, own)
        entry |= {
            f"{phase}_tokens_per_s": tokens / own.median,
            f"{phase}_time_ratio": {"ratio": pair.ratio, "low": pair.low, "high": pair.high},
            f"{phase}_seconds": list(own.seconds),
        }
    return entry


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
