"""What compression did to a model's predictions, measured on text that it was not calibrated on."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .apply import Outcome, Store
from .folding import Folds
from .recipe import Recipe
from .stored_block import put_block


@dataclass(frozen=True)
class Quality:
    """The compressed model beside the original on held-out tokens.

    Attributes:
        kl: mean over tokens of KL(original || compressed), in nats.
        top1: fraction of tokens for which both find the same next one the likeliest.
        perplexity, perplexity_before: of the next token; None where a model predicts others.
        tokens: how many.
        sha256: of the token ids.
    """

    kl: float
    top1: float
    perplexity: float | None
    perplexity_before: float | None
    tokens: int
    sha256: str


@torch.no_grad()
def measure(model, recipe: Recipe, store: Store, windows: torch.Tensor) -> Quality:
    """Runs the original and what the store holds through the held-out windows, block by block.

    In memory: one block, the layer inputs of all windows twice, at the end embedding and head with
    the logits of one window, five times. A rotated model's head is taken as it was before it was
    rounded to the stored dtype.

    Args:
        model: a `BlockModel`.
        recipe: what the store's blocks were made with.
        store: holds all blocks.
        windows: int64 (windows, seqlen).
    """
    inputs = model.block_inputs([windows], [])
    before, folds = inputs.hidden[0], Folds(model, recipe)
    entered = [before]
    folds.enter(entered)
    after = entered[0]
    for i, calls in enumerate(inputs.kwargs):
        model.load_block(i)
        before = model.forward_block(i, before, calls[0])
        schemes = Outcome.from_dict(store.finished[i]).schemes
        put_block(model, i, dict(store.read(i)), schemes)
        after = model.forward_block(i, after, calls[0])
        model.free_block(i)
    after = folds.leave(after)
    causal = type(model.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    digest = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
    states = (s for pair in zip(before, after, strict=True) for s in pair)
    ids = windows.repeat_interleave(2, 0)
    logits = model.each_logits((i[None], s[None]) for i, s in zip(ids, states, strict=True))
    kl = same = 0.0
    losses: tuple[list[float], list[float]] = ([], [])  # of the original, of the compressed
    for window in windows:
        old, new = (next(logits)[0].float().log_softmax(-1) for _ in range(2))
        kl += float(F.kl_div(new, old, log_target=True, reduction="sum"))
        same += float((old.argmax(-1) == new.argmax(-1)).sum())
        for found, mine in zip(losses, (old, new), strict=True):
            found.append(float(F.nll_loss(mine[:-1], window[1:])) if causal else math.nan)
    logits.close()
    return Quality(
        kl=kl / windows.numel(),
        top1=same / windows.numel(),
        perplexity=_perplexity(losses[1]) if causal else None,
        perplexity_before=_perplexity(losses[0]) if causal else None,
        tokens=windows.numel(),
        sha256=digest,
    )


def _perplexity(nll: list[float]) -> float:
    mean = sum(nll) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf
