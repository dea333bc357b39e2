"""Path in, path out: `genai_perf.compress`."""

import hashlib
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from .._checks import check_choice
from .._errors import CalibrationError, CheckpointError
from .._version import __version__
from ..compression import calibration as text
from ..compression import folding
from ..compression.activations import OnDisk
from ..compression.apply import Progress, compress_blocks, quantization_config
from ..compression.quality import measure
from ..compression.ranks import Ranks
from ..compression.recipe import Recipe
from ..compression.report import Report
from ..io import compressed_tensors
from ..io.checkpoints import CONFIG, Checkpoint
from ..io.resume import ResumableWriter, work_folder
from ..io.shards import hash_file
from ..io.writer import disk
from .checkpoint_model import CheckpointModel


def compress(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe | str,
    *,
    calibration: str | Path | Sequence[str] | torch.Tensor | None = None,
    max_seqlen: int | None = None,
    n_samples: int = 128,
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: int | str = "5GB",
    int8: str = "int-quantized",
    activations: str = "memory",
    restart: bool = False,
    heldout: str | Path | Sequence[str] | torch.Tensor | None = None,
    n_heldout: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Compresses a checkpoint folder into a new one that transformers loads, block by block.

    Every finished block is committed to `.<name>.partial` beside dst. A call that was interrupted
    or killed at any moment goes on from there when it is repeated, and writes the same bytes as if
    it had not been; a call with other settings is refused.

    Where torch.distributed is in use, all ranks make the same call, on folders that all can read:
    each calibrates on its share of the windows and solves its share of every block's layers, the
    first writes, and all get the report.

    Args:
        src: dense checkpoint folder: config.json, safetensors, tokenizer.
        dst: the folder to create; it must not exist, and exists only once it is complete.
        recipe: a Recipe, one step, a name such as "int4-gptq", a dict, or a .yaml or .json file.
        calibration: a .txt, .json or .jsonl file; or texts; or int64 token ids (windows, seqlen).
            None suffices for recipes of RTN and Magnitude, whose report then has errors of weights,
            not of outputs.
        max_seqlen: tokens in a calibration window; None: 2048, or what the model takes at most.
        n_samples: windows to calibrate on.
        seed: of the choice of windows.
        device: where blocks are computed.
        max_shard_size: bytes, or text such as "5GB".
        int8: the layout of int8 weights, "int-quantized" or "pack-quantized", which vLLM needs; the
            values are the same.
        activations: where the layer inputs of all windows live, 4 bytes x hidden size a token on a
            CPU: "memory", or "disk" for files beside dst.
        restart: drop the finished blocks of an earlier call.
        heldout: text or token ids, as calibration, on which the report compares the result with
            the original (`compression.quality`); None: it does not.
        n_heldout: windows of it, of at most 256 tokens.
        progress: called with (blocks finished, blocks in all, what runs now).

    Returns:
        Report: also written as dst/report.json.

    Raises:
        CheckpointError: src cannot be read or holds NaN, dst exists, a layer that no checkpoint
            format holds, an unfinished call with other settings.
        CalibrationError: no text, too little, or a Hessian that cannot be used; names the layer.
        ValueError: a recipe that is not one.
    """
    started = time.perf_counter()
    recipe = Recipe.of(recipe)
    if isinstance(calibration, str | Path):
        calibration = text.read_texts(calibration)
    if isinstance(heldout, str | Path):
        heldout = text.read_texts(heldout)
    if calibration is None and recipe.needs_calibration:
        raise CalibrationError(f"recipe {recipe.name} needs calibration text, got none")
    check_choice("compress", "int8", int8, compressed_tensors.INT8_LAYOUTS)
    check_choice("compress", "activations", activations, ("memory", "disk"))
    Ranks().from_first(lambda: work_folder(Path(dst)))  # before the source is read through
    checkpoint = Checkpoint(src)
    # fp32 on a CPU, which is slow and coarse in half precision; what is stored is in the
    # checkpoint's dtype either way.
    on_cpu = torch.device(device).type == "cpu"
    model = CheckpointModel(src, dtype=torch.float32 if on_cpu else None, device=device,
                            calibrated=calibration is not None)  # fmt: skip
    windows = None
    if calibration is not None:
        windows = _windows(model, calibration, max_seqlen, n_samples, seed)
    unseen = None
    if heldout is not None:
        unseen = _windows(model, heldout, min(256, max_seqlen or 256, _limit(model) or 256),
                          n_heldout, seed)  # fmt: skip
    key = {
        "source": _hash_files(checkpoint),
        "recipe": recipe.to_dict(),
        "calibration": None if windows is None else _describe(windows, seed),
        "device": str(device),
        "layout of int8": int8,
        "max_shard_size": max_shard_size,
        "versions": _versions(),
    }
    ranks, store = Ranks(), _Elsewhere()

    def open_store() -> None:
        nonlocal store
        store = ResumableWriter(dst, key=key, source=src, max_shard_size=max_shard_size,
                                restart=restart)  # fmt: skip
        if not store.finished:
            try:
                model.check_finite()
            except CheckpointError:
                store.__exit__()
                raise

    def finish() -> Report:
        for name, tensor in folding.outside(model, recipe):
            if name not in store:
                store.write({name: tensor})
        unknown = [f"{n}: not carried over: the model has no such tensor" for n in model.unused]
        report = Report(
            recipe=recipe.to_dict(),
            name=recipe.name,
            source=Path(src).resolve().name,
            source_hash=key["source"],
            calibration=key["calibration"],
            layers=tuple(outcome.layers),
            nbytes_before=checkpoint.nbytes,
            nbytes_after=store.nbytes,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=_peak_rss(),
            versions=key["versions"],
            notes=(*outcome.notes, *unknown, *_unread(model, outcome.schemes), *_offloaded(model)),
            quality=None if unseen is None else asdict(measure(model, recipe, store, unseen)),
        )
        store.write_json("report.json", report.to_dict())
        config = folding.config(recipe, checkpoint.config)
        quantized = quantization_config(model, recipe, outcome)
        if quantized is not None:
            config["quantization_config"] = quantized
        store.commit(config)
        return report

    ranks.from_first(open_store)
    with store, _layer_inputs(activations, Path(dst), ranks.rank) as hidden:
        try:
            outcome = compress_blocks(model, recipe, store, windows=windows, hidden=hidden,
                                      int8=int8, progress=progress)  # fmt: skip
        except (CheckpointError, CalibrationError) as error:
            if not store.finished:
                raise
            raise type(error)(f"{error}; {len(store.finished)} finished blocks are kept, and the "
                              f"same call goes on from them") from error  # fmt: skip
        return ranks.from_first(finish)


class _Elsewhere(nullcontext):
    """The store of every rank but the first, which writes for all."""

    finished: tuple = ()


@contextmanager
def _layer_inputs(where: str, dst: Path, rank: int) -> Iterator[MutableSequence[torch.Tensor]]:
    if where == "memory":
        yield []
        return
    folder = dst.parent / f".{dst.name}.partial" / f"activations-{rank}"
    with disk(dst):
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
        folder.mkdir()
        try:
            yield OnDisk(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _unread(model: CheckpointModel, schemes: Mapping) -> list[str]:
    """That transformers does not load quantized experts, and what does."""
    found = model.spelling.unread(schemes)
    if not found:
        return []
    version, kind = metadata.version("transformers"), model.checkpoint.config["model_type"]
    return [f"{found[0]} and {len(found) - 1} more: experts are written one by one, as "
            f"llm-compressor writes them; transformers {version} does not load those of {kind} in "
            f"this scheme: genai_perf.load_compressed does"]  # fmt: skip


def _offloaded(model: CheckpointModel) -> list[str]:
    """That blocks did not fit the device, and how they were run."""
    if not model.offloaded:
        return []
    first, (taken, free) = next(iter(model.offloaded.items()))
    return [f"{model.blocks[first][0]} and {len(model.offloaded) - 1} more: at most {taken} bytes "
            f"with Hessians where {model.device} had {free} free: run one layer at a time through "
            f"accelerate's hooks"]  # fmt: skip


def _limit(model: CheckpointModel) -> int | None:
    """The most tokens that the model takes, where its config says it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _windows(model: CheckpointModel, calibration: Sequence[str] | torch.Tensor,
             max_seqlen: int | None, n_samples: int, seed: int) -> torch.Tensor:  # fmt: skip
    vocab_size = model.model.get_input_embeddings().num_embeddings
    limit = _limit(model)
    if isinstance(calibration, torch.Tensor):
        ids = calibration
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise CalibrationError(f"calibration: token ids must be int64 (windows, seqlen), "
                                   f"got {ids.dtype} {tuple(ids.shape)}")  # fmt: skip
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise CalibrationError(f"calibration: token ids must be from 0 to {vocab_size - 1}, "
                                   f"got {int(ids.min())} to {int(ids.max())}")  # fmt: skip
        return ids
    if model.tokenizer is None:
        raise CheckpointError(f"{model.checkpoint.path}: has no tokenizer, which calibration text "
                              f"needs: give token ids instead")  # fmt: skip
    if max_seqlen is None:
        max_seqlen = min(2048, limit or 2048)
    elif limit is not None and max_seqlen > limit:
        raise CalibrationError(f"calibration: max_seqlen must be at most {limit}, the model's "
                               f"max_position_embeddings, got {max_seqlen}")  # fmt: skip
    return text.windows(
        calibration,
        lambda one: model.tokenizer(one, verbose=False).input_ids,
        max_seqlen=max_seqlen,
        n_samples=n_samples,
        vocab_size=vocab_size,
        seed=seed,
    )


def _describe(windows: torch.Tensor, seed: int) -> dict:
    digest = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
    count, seqlen = windows.shape
    return {"windows": count, "max_seqlen": seqlen, "seed": seed, "sha256": digest}


def _hash_files(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256((checkpoint.path / CONFIG).read_bytes())
    for file in sorted({checkpoint.info(name).file for name in checkpoint.names()}):
        digest.update(hash_file(file).encode())
    return digest.hexdigest()


def _peak_rss() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "genai_perf": __version__,
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }
