"""Teachers other than a head and its hidden states: given logits, or what was kept of them."""

from dataclasses import dataclass

import torch

from ..._checks import check_choice, check_positive, check_tensor, fail


@dataclass(frozen=True)
class Logits:
    """The teacher's logits themselves.

    Args:
        logits: (..., V), fp32, bf16 or fp16.
    """

    logits: torch.Tensor

    def __post_init__(self):
        check_tensor("Logits", logits=self.logits)


@dataclass(frozen=True)
class TopK:
    """The teacher's k most likely tokens.

    Args:
        ids: (..., k) int32 or int64, none twice in a row.
        logprobs: (..., k) natural log-probabilities over the whole vocabulary, fp32 or fp16.
        tail: "bin": what the k leave is one bin, for teacher and student; the divergence is a lower
            bound of the dense one, and equal to it at k = V. "renorm": both are conditioned on the
            k ids: nothing outside them gets a gradient.
        temperature: at which the log-probabilities were taken. A loss at another temperature needs
            tail="renorm": the mass outside k ids is not known at any other temperature.

    Raises:
        ValueError: a shape, dtype or tail that does not fit.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    tail: str = "bin"
    temperature: float = 1.0

    def __post_init__(self):
        check_tensor("TopK", ids=self.ids, logprobs=self.logprobs)
        check_choice("TopK", "tail", self.tail, ("bin", "renorm"))
        check_positive("TopK", temperature=self.temperature)
        if self.ids.dtype not in (torch.int32, torch.int64):
            fail("TopK", "ids", "int32 or int64", self.ids.dtype)
        if not self.logprobs.is_floating_point():
            fail("TopK", "logprobs", "floating point", self.logprobs.dtype)
        if self.ids.shape != self.logprobs.shape or self.ids.dim() < 2 or not self.ids.shape[-1]:
            fail("TopK", "ids and logprobs", "of one shape (..., k), k at least 1",
                 f"{tuple(self.ids.shape)} and {tuple(self.logprobs.shape)}")  # fmt: skip

    @classmethod
    def from_logits(cls, logits: torch.Tensor, k: int, *, tail: str = "bin",
                    temperature: float = 1.0) -> "TopK":  # fmt: skip
        """The k largest of each row of logits (..., V), most likely first."""
        if not 1 <= k <= logits.shape[-1]:
            fail("TopK.from_logits", "k", f"from 1 to {logits.shape[-1]}", k)
        scores = logits.to(torch.float32) / temperature
        values, ids = scores.topk(k)
        return cls(ids, values - scores.logsumexp(-1, keepdim=True), tail, temperature)
