"""A whole distillation, folder in, folder out: what `genaiperf distill` runs."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .._checks import check_positive
from .._errors import CheckpointError
from ..distill import TeacherCache
from ..distill.cache import vocabulary_hash
from ..distill.settings import DistillationSettings
from .distillation_trainer import (
    CacheDataset,
    LossAtHead,
    WindowDataset,
    _trainer_class,
    check_same_tokenizer,
)
from .students import student_from_teacher
from .teacher_caching import load, text_windows
from .teacher_process import TeacherProcess

RECORD = "distill.json"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        steps: optimizer steps.
        batch: windows in a batch; accumulate: batches in a step.
        seqlen: tokens in a window.
        lr: peak learning rate, after `warmup` steps, falling linearly to 0.
        log_every, save_every, eval_every: in steps.
        eval_windows: held-out windows.
    """

    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    seqlen: int = 256
    lr: float = 1e-3
    warmup: int = 10
    seed: int = 0
    log_every: int = 10
    save_every: int = 50
    eval_every: int = 50
    eval_windows: int = 16

    def __post_init__(self):
        numbers = {name: value for name, value in asdict(self).items() if name != "seed"}
        numbers["warmup"] += 1  # 0 is none
        check_positive("Schedule", **numbers)


def distill(
    teacher: str | Path | None,
    out: str | Path,
    texts: Sequence[str],
    held_out: Sequence[str],
    *,
    student: str | Path | None = None,
    config: str | Path | None = None,
    layers: int | None = None,
    intermediate_size: int | None = None,
    cache: str | Path | None = None,
    process_top_k: int | None = None,
    settings: DistillationSettings | None = None,
    schedule: Schedule | None = None,
    resume: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Train a student and write it to OUT/model, with OUT/distill.json: settings and loss curve.

    Args:
        teacher: checkpoint folder; needed unless there are `student` and `cache`.
        out: folder; with `resume` that of an interrupted run.
        texts: training text; not used with a cache, which holds its own.
        held_out: text for the held-out loss, on labels alone.
        student: checkpoint folder to start from; or `config`, a config.json of an untrained
            student; or the teacher with `layers` layers and MLPs of `intermediate_size`.
        cache: a TeacherCache instead of the teacher running along.
        process_top_k: run the teacher in a process of its own and take this many tokens of it.
        progress: called with (steps done, steps in all, what the loss is).

    Returns:
        dict: what distill.json holds.

    Raises:
        CheckpointError: a folder that cannot be read, or `out` that exists.
        ValueError: tokenizers that differ, settings that do not go together.
    """
    import transformers

    out = Path(out)
    settings, schedule = settings or DistillationSettings(), schedule or Schedule()
    checkpoints = out / "checkpoints"
    if resume and not any(checkpoints.glob("checkpoint-*")):
        raise CheckpointError(f"{out}: holds no checkpoint to go on from")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists: name another folder, or go on with --resume")
    model, tokenizer, live = _student(teacher, student, config, layers, intermediate_size, cache)
    process = None
    if cache is not None:
        source = TeacherCache(cache)
        source.check(tokenizer=vocabulary_hash(tokenizer.get_vocab()))
        data = CacheDataset(source)
        seqlen = source.identity.seqlen
    else:
        seqlen = schedule.seqlen
        data = WindowDataset(text_windows(texts, tokenizer, seqlen))
        source = live
        if process_top_k is not None:
            source = process = TeacherProcess(teacher, process_top_k,
                                              temperature=settings.temperature)  # fmt: skip
    held = text_windows(held_out, tokenizer, seqlen, schedule.eval_windows)
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints), max_steps=schedule.steps, seed=schedule.seed,
        per_device_train_batch_size=schedule.batch, learning_rate=schedule.lr,
        gradient_accumulation_steps=schedule.accumulate, warmup_steps=schedule.warmup,
        lr_scheduler_type="linear", weight_decay=0.0, adam_beta2=0.95,
        logging_steps=schedule.log_every, save_steps=schedule.save_every, save_total_limit=1,
        report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    try:
        trainer = _trainer_class()(model, arguments, teacher=source, settings=settings,
                                   train_dataset=data, processing_class=tokenizer)  # fmt: skip
        record = _Record(out, settings, schedule, held, resume)
        for known in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(known)
        trainer.add_callback(_callback(record, model, progress))
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        if process is not None:
            process.close()
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    record.write(finished=True)
    return record.content


def _student(teacher, student, config, layers, intermediate_size, cache):
    """(student, tokenizer, the live teacher or None)."""
    import transformers

    made = layers is not None or intermediate_size is not None
    if (student is not None) + (config is not None) + made != 1:
        raise ValueError("distill: the student must be one of: a folder, a config, or the teacher "
                         "with fewer layers or a smaller intermediate size")  # fmt: skip
    if teacher is None and (student is None or cache is None):
        raise ValueError("distill: a teacher's folder is needed, unless a student's folder and a "
                         "teacher cache are given")  # fmt: skip
    live = tokenizer = None
    if teacher is not None:
        live, tokenizer = load(teacher)
    if student is not None:
        model, own = load(student)
        if tokenizer is not None:
            check_same_tokenizer(own, tokenizer)
        return model, own, live
    if made:
        return (student_from_teacher(live, layers=layers, intermediate_size=intermediate_size),
                tokenizer, live)  # fmt: skip
    try:
        parsed = transformers.AutoConfig.from_pretrained(config, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{config}: is no config: {str(error)[:200]}") from error
    if parsed.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(f"distill: {config} has a vocabulary of "
                         f"{parsed.get_text_config().vocab_size}, the tokenizer {len(tokenizer)}"
                         )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(parsed), tokenizer, live


class _Record:
    """distill.json on its way: every point of the curve is written when it is known."""

    def __init__(self, out, settings, schedule, held, resume):
        self.path, self.held, self.schedule = out / RECORD, held, schedule
        self.content = {"settings": asdict(settings), "schedule": asdict(schedule), "curve": [],
                        "finished": False}  # fmt: skip
        if resume and self.path.exists():
            self.content["curve"] = json.loads(self.path.read_text(encoding="utf-8"))["curve"]

    def forget_after(self, step: int) -> None:
        curve = self.content["curve"]
        self.content["curve"] = [point for point in curve if point["step"] <= step]

    def add(self, step: int, **values: float) -> None:
        curve = self.content["curve"]
        if not curve or curve[-1]["step"] != step:
            curve.append({"step": step})
        curve[-1].update(values)
        self.write()

    def write(self, *, finished: bool = False) -> None:
        self.content["finished"] = finished
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: torch.Tensor, batch: int = 8) -> float:
    """Mean cross entropy in nats per token of windows (n, seqlen), the first token given."""
    loss = LossAtHead(DistillationSettings(alpha=1.0), None)
    device = next(model.parameters()).device
    training, total = model.training, 0.0
    model.eval()
    for ids in windows.split(batch):
        ids = ids.to(device)
        total += loss(model, model, {"input_ids": ids, "labels": ids})[0].item() * len(ids)
    model.train(training)
    return total / len(windows)


def _callback(record: _Record, model, progress):
    import transformers

    schedule = record.schedule

    class Progress(transformers.TrainerCallback):
        said = ""

        def on_train_begin(self, args, state, control, **kwargs):
            record.forget_after(state.global_step)
            if state.global_step == 0:
                record.add(0, held_out=held_out_loss(model, record.held))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                names = {"loss": "loss", "loss_soft": "teacher", "loss_hard": "labels"}
                found = {names[k]: float(v) for k, v in logs.items() if k in names}
                record.add(state.global_step, **found)
                self.said = f"loss {found['loss']:.3f}"

        def on_step_end(self, args, state, control, **kwargs):
            step = state.global_step
            if step % schedule.eval_every == 0 or step == schedule.steps:
                record.add(step, held_out=held_out_loss(model, record.held))
            if progress:
                progress(step, schedule.steps, self.said)

    return Progress()
