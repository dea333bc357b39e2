"""DistillationTrainer: transformers' Trainer with the losses of gp.distill at the head."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn
from torch.utils.data import Dataset

from .._checks import fail
from ..distill import TeacherCache, TopK, fused_linear_distillation_loss
from ..distill.cache import vocabulary_hash
from ..distill.settings import DistillationSettings
from .heads import at_head, head_of, hidden_at_head, logit_transform

IGNORED = -100


def _example(tokens: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    labels = tokens.clone()
    labels[0] = IGNORED  # nothing predicts it, so nothing counts it
    return {"input_ids": tokens, "labels": labels, "window": torch.tensor(index)}


class WindowDataset(Dataset):
    """Windows of token ids (windows, seqlen) as the trainer takes them; every token is a label."""

    def __init__(self, windows: torch.Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _example(self.windows[index].long(), index)


class CacheDataset(Dataset):
    """The text of a teacher cache, or the windows `only` of it."""

    def __init__(self, teacher_cache: TeacherCache, only: Sequence[int] | None = None):
        self.cache = teacher_cache
        self.only = range(len(teacher_cache)) if only is None else only

    def __len__(self) -> int:
        return len(self.only)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.only[index]
        return _example(self.cache.tokens(window), window)


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Windows of one length, stacked."""
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}


def check_same_tokenizer(student: object, teacher: object) -> None:
    """Raises ValueError where two tokenizers do not give the same tokens the same ids."""
    ours, theirs = (vocabulary_hash(t.get_vocab()) for t in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"distillation: the student's tokenizer ({len(student)} tokens) and the teacher's "
            f"({len(teacher)} tokens) differ, and their probabilities cannot be compared token by "
            "token: give both one tokenizer"
        )


class LossAtHead:
    """The loss of one batch, computed inside of the student's forward.

    Args:
        settings: what is minimised.
        teacher: a transformers model; a TeacherCache; or anything with
            `top_k(input_ids) -> TopK`, such as a TeacherProcess; None where alpha is 1.
    """

    def __init__(self, settings: DistillationSettings, teacher: object):
        self.settings, self.teacher = settings, teacher
        self.live = isinstance(teacher, nn.Module)
        if self.live:
            teacher.eval().requires_grad_(False)
            head_of(teacher)
        elif teacher is None and settings.alpha == 1:
            return
        elif not isinstance(teacher, TeacherCache) and not hasattr(teacher, "top_k"):
            raise TypeError("distillation: teacher must be a model, a TeacherCache or have top_k, "
                            f"got {type(teacher).__name__}")  # fmt: skip

    def targets(self, inputs: dict[str, torch.Tensor]) -> dict:
        """The teacher's side as keywords of `fused_linear_distillation_loss`."""
        if self.settings.alpha == 1:
            return {}
        ids = inputs["input_ids"]
        if self.live:
            passed = {k: v for k, v in inputs.items() if k not in ("labels", "window")}
            with torch.no_grad():
                hidden = hidden_at_head(self.teacher, {**passed, "use_cache": False})
            head, transform = head_of(self.teacher), logit_transform(self.teacher.config)
            return {"teacher_hidden": hidden, "teacher_weight": head.weight,
                    "teacher_bias": head.bias, "teacher_softcap": transform["softcap"],
                    "teacher_logit_scale": transform["logit_scale"]}  # fmt: skip
        if isinstance(self.teacher, TeacherCache):
            if "window" not in inputs:
                raise ValueError("distillation: a batch for a TeacherCache needs 'window', the "
                                 "index of each sequence in it: use CacheDataset")  # fmt: skip
            windows = inputs["window"].tolist()
            same = [torch.equal(self.teacher.tokens(w), row.cpu())
                    for w, row in zip(windows, ids, strict=True)]  # fmt: skip
            if not all(same):
                raise ValueError(f"distillation: {self.teacher.path} is the cache of another text "
                                 f"than window {windows[same.index(False)]} of the batch"
                                 )  # fmt: skip
            kept = self.teacher.teacher(windows)
        else:
            kept = self.teacher.top_k(ids)
        return {"teacher": TopK(kept.ids.to(ids.device), kept.logprobs.to(ids.device), kept.tail,
                                kept.temperature)}  # fmt: skip

    def __call__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, its parts) of a batch; `model` may be a wrapper around `unwrapped`."""
        targets = self.targets(inputs)
        labels = inputs["labels"]
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        found = []

        def loss(hidden: torch.Tensor, head: nn.Linear) -> None:
            found.append(
                fused_linear_distillation_loss(
                    hidden, head.weight, labels=labels, student_bias=head.bias, num_items=num_items,
                    ignore_index=IGNORED, chunk_bytes=self.settings.chunk_bytes, return_parts=True,
                    **targets, **logit_transform(unwrapped.config), **self.settings.loss_options(),
                )
            )  # fmt: skip

        passed = {k: v for k, v in inputs.items() if k not in ("labels", "window")}
        with at_head(unwrapped, loss):
            model(**passed, use_cache=False)
        return found[0]


@torch.no_grad()
def rollout(model: nn.Module, inputs: dict[str, torch.Tensor], settings: DistillationSettings,
            seed: int) -> dict[str, torch.Tensor]:  # fmt: skip
    """The batch with everything after the first prompt tokens written by the student; the prompt
    is no label."""
    ids = inputs["input_ids"]
    prompt = settings.prompt_tokens
    if prompt >= ids.shape[1]:
        fail("rollout", "prompt_tokens", f"below the {ids.shape[1]} tokens of a window", prompt)
    training = model.training
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(seed)
        new = ids.shape[1] - prompt
        written = model.eval().generate(
            input_ids=ids[:, :prompt], attention_mask=torch.ones_like(ids[:, :prompt]),
            do_sample=True, temperature=settings.sample_temperature, top_k=0, top_p=1.0,
            min_new_tokens=new, max_new_tokens=new,
        )  # fmt: skip
    model.train(training)
    labels = written.clone()
    labels[:, :prompt] = IGNORED
    return {"input_ids": written, "labels": labels}


@cache
def _trainer_class() -> type:
    import transformers

    class DistillationTrainer(transformers.Trainer):
        """transformers' Trainer, whose loss compares the student with a teacher.

        The loss is computed at the student's head, in the forward of the (wrapped) model: logits
        exist only in chunks. It is divided by the valid tokens of all accumulated batches and all
        processes, so gradient accumulation changes nothing. `loss_soft` and `loss_hard`, the
        divergence and the cross entropy, are logged beside the loss.

        Args:
            model: the student, a transformers causal language model.
            args: transformers.TrainingArguments; remove_unused_columns is set to False.
            teacher: a model of the same tokenizer; a TeacherCache, whose `CacheDataset` is the
                data; or a TeacherProcess.
            settings: DistillationSettings.
            train_dataset, eval_dataset: of {"input_ids", "labels"} as WindowDataset gives them.
                Labels stand where their tokens stand; the shift is done here.
            processing_class, teacher_tokenizer: tokenizers of student and teacher, compared where
                both are given (a cache knows its own).
            data_collator, callbacks, optimizers: as in transformers.Trainer.

        Raises:
            ValueError: tokenizers that differ, a head that is not an nn.Linear.
            CheckpointError: a cache of another tokenizer.
        """

        def __init__(
            self,
            model: nn.Module,
            args: "transformers.TrainingArguments",
            *,
            teacher: object,
            settings: DistillationSettings | None = None,
            train_dataset: Dataset | None = None,
            eval_dataset: Dataset | None = None,
            processing_class: object | None = None,
            teacher_tokenizer: object | None = None,
            data_collator: Callable | None = None,
            callbacks: list | None = None,
            optimizers: tuple = (None, None),
        ):
            settings = settings or DistillationSettings()
            if settings.on_policy and isinstance(teacher, TeacherCache):
                fail("DistillationTrainer", "on_policy", "0 with a TeacherCache, which does not "
                     "know what the student will write", settings.on_policy)  # fmt: skip
            if processing_class is not None:
                if teacher_tokenizer is not None:
                    check_same_tokenizer(processing_class, teacher_tokenizer)
                elif isinstance(teacher, TeacherCache):
                    teacher.check(tokenizer=vocabulary_hash(processing_class.get_vocab()))
            head_of(model)
            args.remove_unused_columns = False
            args.label_names = ["labels"]
            super().__init__(
                model=model, args=args, data_collator=data_collator or collate,
                train_dataset=train_dataset, eval_dataset=eval_dataset,
                processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
            )  # fmt: skip
            # The Trainer then counts the tokens of all accumulated batches and leaves it to us.
            self.model_accepts_loss_kwargs = True
            self.settings, self.loss_at_head = settings, LossAtHead(settings, teacher)
            if self.loss_at_head.live:
                teacher.to(args.device)
            self._parts, self._parts_of = torch.zeros(2), 0

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not self.settings.on_policy or not samples:
                return samples, items
            for i, batch in enumerate(samples):
                seed = self.args.seed + 1_000_003 * (self.state.global_step * num_batches + i)
                draw = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
                if draw < self.settings.on_policy:
                    student = self.accelerator.unwrap_model(self.model)
                    batch = {k: v.to(device) for k, v in batch.items()}
                    samples[i] = rollout(student, batch, self.settings, seed)
            return samples, self._get_num_items_in_batch(samples, device)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            student = self.accelerator.unwrap_model(self.model)
            loss, parts = self.loss_at_head(model, student, inputs, num_items_in_batch)
            if model.training:
                self._parts += parts.detach().cpu()
                self._parts_of += num_items_in_batch is None
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
            return (loss, {}) if return_outputs else loss

        def log(self, logs, start_time=None):
            steps = self.state.global_step - getattr(self, "_logged_step", 0)
            if "loss" in logs and steps:
                soft, hard = (self._parts / max(steps, self._parts_of)).tolist()
                logs = logs | ({"loss_soft": soft} if self.settings.alpha < 1 else {})
                logs = logs | ({"loss_hard": hard} if self.settings.alpha > 0 else {})
                self._parts.zero_()
                self._parts_of, self._logged_step = 0, self.state.global_step
            super().log(logs, start_time)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            return loss.detach(), None, None

    DistillationTrainer.__qualname__ = "DistillationTrainer"
    return DistillationTrainer


def __getattr__(name: str):
    if name == "DistillationTrainer":
        return _trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
