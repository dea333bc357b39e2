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
    the logits of all windows twice. A rotated model's head is taken as it was before it was
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
    logits, found = (model.logits(windows, states).float() for states in (before, after))
    causal = type(model.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    digest = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
    kl = [float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
          for a, b in zip(logits, found, strict=True)]  # fmt: skip
    return Quality(
        kl=sum(kl) / windows.numel(),
        top1=float((logits.argmax(-1) == found.argmax(-1)).float().mean()),
        perplexity=_perplexity(found, windows) if causal else None,
        perplexity_before=_perplexity(logits, windows) if causal else None,
        tokens=windows.numel(),
        sha256=digest,
    )


def _perplexity(logits: torch.Tensor, windows: torch.Tensor) -> float:
    nll = [float(F.cross_entropy(one[:-1], ids[1:]))
           for one, ids in zip(logits, windows, strict=True)]  # fmt: skip
    mean = sum(nll) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf
