"""Quality of a causal language model on given tokens: torch alone, any model that gives logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import fail


@dataclass(frozen=True)
class Quality:
    """Mean negative log likelihood in nats per token, and exp of it; `window_nll` per window."""

    nll: float
    tokens: int
    window_nll: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


def windows(token_ids: Tensor, window: int, *, limit: int | None = None) -> Tensor:
    """Cut a stream of tokens into windows that do not overlap; what is left at the end is dropped.

    Args:
        token_ids: (tokens,) int64.
        window: tokens in each.
        limit: at most this many, spread evenly over the stream; None: all.

    Returns:
        Tensor: (windows, window) int64.

    Raises:
        ValueError: the stream is shorter than one window.
    """
    if window < 2:
        fail("windows", "window", "at least 2 tokens", window)
    count = token_ids.numel() // window
    if count == 0:
        fail("windows", "token_ids", f"at least one window of {window} tokens", token_ids.numel())
    cut = token_ids[: count * window].view(count, window)
    if limit is None or limit >= count:
        return cut
    return cut[torch.linspace(0, count - 1, limit).round().long()]


@torch.inference_mode()
def perplexity(model: Callable[[Tensor], object], token_windows: Tensor, *, batch_size: int = 1,
               on_batch: Callable[[int], None] | None = None) -> Quality:  # fmt: skip
    """Perplexity over windows: exp(mean of -log p(token | tokens before it in its window)).

    The first token of a window is context only, so each window scores window - 1 tokens.

    Args:
        model: called with (batch, window) int64; returns logits (batch, window, vocabulary), or an
            object with them in `.logits`.
        token_windows: (windows, window) int64, from `windows`.
        batch_size: windows a call.
        on_batch: called with the number of windows done.
    """
    losses: list[float] = []
    for batch in token_windows.split(batch_size):
        out = model(batch)
        logits = getattr(out, "logits", out)[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses += nll.view(len(batch), -1).double().mean(1).tolist()
        if on_batch:
            on_batch(len(losses))
    tokens = len(losses) * (token_windows.shape[1] - 1)
    return Quality(sum(losses) / len(losses), tokens, tuple(losses))


@torch.inference_mode()
def divergence(model: Callable[[Tensor], object], original: Callable[[Tensor], object],
               token_windows: Tensor, *, batch_size: int = 1) -> float:  # fmt: skip
    """Mean over all tokens of KL(original || model), in nats: what `perplexity` says of a change
    without the luck of which tokens come next, so that fewer windows tell two changes apart.

    Args:
        model, original: as in `perplexity`, with one vocabulary.
        token_windows: (windows, window) int64.
        batch_size: windows a call.
    """
    total = 0.0
    for batch in token_windows.split(batch_size):
        q, p = (getattr(out, "logits", out).float().log_softmax(-1)
                for out in (model(batch), original(batch)))  # fmt: skip
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    return total / token_windows.numel()
