"""The kernel as it ships, for the ahead-of-time gate."""

from collections.abc import Iterator

from ...._backends.triton_aot import Source
from ..options import KINDS
from .kernel import _distill_loss_kernel
from .launch import MOST_BLOCK, WARPS

FLOATS = ("scale", "softcap", "teacher_scale", "teacher_softcap", "over_temperature", "temperature",
          "beta", "soft_weight", "hard_weight", "logprob_scale")  # fmt: skip
TEACHERS = ("none", "dense", "topk", "topk-renorm")


def source(kind: str, teacher: str, dtype: str, *, cap: bool = False, own_sum: bool = False
           ) -> Source:  # fmt: skip
    constants = {
        "KIND": KINDS.index(kind), "TEACHER": TEACHERS.index(teacher), "HARD": True,
        "OWN_SUM": own_sum, "SOFTCAP": cap, "TEACHER_SOFTCAP": cap, "GRAD": True,
        "BLOCK": MOST_BLOCK, "BLOCK_K": 64 if teacher.startswith("topk") else 1,
    }  # fmt: skip
    if teacher != "dense":
        constants["teacher_ptr"] = None
    if not teacher.startswith("topk"):
        constants |= {"ids_ptr": None, "logprobs_ptr": None}
    pointers = {"ids_ptr": "i32", "logprobs_ptr": "fp32", "labels_ptr": "i64",
                "weights_ptr": "fp32", "loss_ptr": "fp32"}  # fmt: skip
    name = f"distill_loss {kind} {teacher} {dtype}" + " cap" * cap + " own_sum" * own_sum
    return Source(name, _distill_loss_kernel, constants, dtype, pointers, FLOATS,
                  {"num_warps": WARPS, "num_stages": 1}, "none")  # fmt: skip


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships; the subset holds one source."""
    yield source("forward_kl", "dense", "fp32")
    if subset:
        return
    for kind in KINDS:
        yield source(kind, "dense", "fp32", cap=True, own_sum=True)
        yield source(kind, "topk", "fp32")
    yield source("forward_kl", "none", "fp32")
    yield source("forward_kl", "topk-renorm", "fp32", cap=True, own_sum=True)
    for dtype in ("bf16", "fp16"):
        yield source("jsd", "dense", dtype)
        yield source("forward_kl", "topk", dtype, own_sum=True)
