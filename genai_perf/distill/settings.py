"""The words of a distillation run, one frozen dataclass."""

from dataclasses import dataclass

from .._checks import check_choice, check_positive, fail
from ..ops.distill_loss.options import KINDS


@dataclass(frozen=True)
class DistillationSettings:
    """What is minimised, and on which text.

    Args:
        kind, temperature, alpha, beta, t2_scale: as in `distillation_loss`.
        on_policy: share of batches, 0 to 1, whose text the student writes itself after the first
            `prompt_tokens` (GKD's lambda); the teacher then judges what the student wrote.
        prompt_tokens: of a window, kept as the prompt of an on-policy batch.
        sample_temperature: at which the student samples.
        chunk_bytes: of fp32 logits at a time.

    Source: on-policy share: Agarwal et al., arXiv:2306.13649.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    alpha: float = 0.0
    beta: float | None = None
    t2_scale: bool = True
    on_policy: float = 0.0
    prompt_tokens: int = 32
    sample_temperature: float = 1.0
    chunk_bytes: int = 128 << 20

    def __post_init__(self):
        op = "DistillationSettings"
        check_choice(op, "kind", self.kind, KINDS)
        check_positive(op, temperature=self.temperature, prompt_tokens=self.prompt_tokens,
                       sample_temperature=self.sample_temperature, chunk_bytes=self.chunk_bytes
                       )  # fmt: skip
        for name, value in (("alpha", self.alpha), ("on_policy", self.on_policy)):
            if not 0 <= value <= 1:
                fail(op, name, "from 0 to 1", value)

    def loss_options(self) -> dict:
        """The keywords that the losses take."""
        return {"kind": self.kind, "temperature": self.temperature, "alpha": self.alpha,
                "beta": self.beta, "t2_scale": self.t2_scale}  # fmt: skip
