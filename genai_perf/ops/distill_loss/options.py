"""What a distillation loss is made of beside its tensors: one list for schema, api, backends."""

from typing import NamedTuple

import torch

from ..._checks import check_choice, check_positive, fail

# csrc/cpu/distill_loss.h holds the same order.
KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv")
TAILS = ("bin", "renorm")
_BETA = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}

SCHEMA = (
    "str kind, float temperature, float beta, float soft_weight, float hard_weight, str tail,"
    " float topk_temperature, float logit_scale, float softcap, float teacher_logit_scale,"
    " float teacher_softcap"
)


class Options(NamedTuple):
    """The arguments of `SCHEMA`, in its order.

    kind: of KINDS; jsd is never at the ends of beta, where it is one of the two KL.
    temperature: both softmaxes of the divergence are of logits / temperature; labels see 1.
    beta: jsd: the teacher's share of the mixture; skew_*: the other distribution's share.
    soft_weight, hard_weight: of the divergence and of the cross entropy, T^2 included.
    tail: what a top-k teacher leaves: "bin", one bin of its own; "renorm": conditioned away.
    topk_temperature: at which a top-k teacher's log-probabilities were taken.
    logit_scale, softcap: z = softcap * tanh(logit_scale * raw / softcap); softcap 0: no cap.
    """

    kind: str
    temperature: float
    beta: float
    soft_weight: float
    hard_weight: float
    tail: str
    topk_temperature: float
    logit_scale: float
    softcap: float
    teacher_logit_scale: float
    teacher_softcap: float


def make_options(op: str, kind: str, temperature: float, alpha: float, beta: float | None,
                 t2_scale: bool, tail: str, topk_temperature: float, logit_scale: float,
                 softcap: float, teacher_logit_scale: float, teacher_softcap: float
                 ) -> Options:  # fmt: skip
    """The options of one call, checked; see `distillation_loss`."""
    check_choice(op, "kind", kind, KINDS)
    check_positive(op, temperature=temperature)
    if not 0 <= alpha <= 1:
        fail(op, "alpha", "from 0 (the teacher alone) to 1 (the labels alone)", alpha)
    if beta is None:
        beta = _BETA.get(kind, 0.0)
    elif kind == "jsd":
        if not 0 <= beta <= 1:
            fail(op, "beta", "from 0 (forward KL) to 1 (reverse KL) for jsd", beta)
        if beta in (0, 1):
            kind = "reverse_kl" if beta else "forward_kl"
    elif kind in _BETA:
        if not 0 <= beta < 1:
            fail(op, "beta", f"at least 0 and below 1 for {kind}", beta)
        if beta == 0:
            kind = "forward_kl" if kind == "skew_kl" else "reverse_kl"
    else:
        fail(op, "beta", f"None for {kind}", beta)
    for name, value in (("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if not value >= 0:
            fail(op, name, "positive, or 0 for none", value)
    soft = (1 - alpha) * (temperature**2 if t2_scale else 1.0)
    return Options(kind, float(temperature), float(beta), float(soft), float(alpha), tail,
                   float(topk_temperature), float(logit_scale), float(softcap),
                   float(teacher_logit_scale), float(teacher_softcap))  # fmt: skip


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
