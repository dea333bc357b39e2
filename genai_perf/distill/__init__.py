"""Distillation: losses whose logits never exist as a whole, teachers kept on disk, a trainer."""

from importlib import import_module

from ..ops.distill_loss import Logits, TopK, distillation_loss, fused_linear_distillation_loss
from .cache import TeacherCache
from .hidden import (
    HiddenProjections,
    hidden_state_loss,
    layer_map,
    minilm_loss,
    relation_loss,
)
from .settings import DistillationSettings

# Names of this subject that need transformers, which only `integrations` knows.
_ELSEWHERE = {
    "DistillationTrainer": "distillation_trainer",
    "CacheDataset": "distillation_trainer",
    "WindowDataset": "distillation_trainer",
    "TeacherProcess": "teacher_process",
    "cache_teacher": "teacher_caching",
    "student_from_teacher": "students",
}

__all__ = [
    "DistillationSettings",
    "HiddenProjections",
    "Logits",
    "TeacherCache",
    "TopK",
    "distillation_loss",
    "fused_linear_distillation_loss",
    "hidden_state_loss",
    "layer_map",
    "minilm_loss",
    "relation_loss",
    *_ELSEWHERE,
]


def __getattr__(name: str):
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"genai_perf.integrations.{_ELSEWHERE[name]}"), name)
    globals()[name] = value
    return value
