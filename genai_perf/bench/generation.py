"""A causal language model at work: prefill and decode as calls to time, and a memory probe."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .evaluate import perplexity


def prefill_call(model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """One forward of the whole prompt, filling a new cache; logits of the last position alone.

    Args:
        model: a transformers causal language model.
        prompt: (batch, tokens) int64.
    """

    @torch.inference_mode()
    def call() -> Tensor:
        return model(prompt, use_cache=True, logits_to_keep=1).logits

    return call


def decode_call(model: nn.Module, prompt: Tensor, steps: int) -> Callable[[], Tensor]:
    """`steps` greedy tokens, one at a time, each from the cache that the prompt and its forerunners
    filled; the cache is cut back to the prompt before, so every call does the same.

    Args:
        model: a transformers causal language model.
        prompt: (batch, tokens) int64; prefilled once, here.
        steps: tokens a call.

    Returns:
        a function that gives the tokens, (batch, steps).
    """
    with torch.inference_mode():
        first = model(prompt, use_cache=True, logits_to_keep=1)
    cache, start = first.past_key_values, first.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def call() -> Tensor:
        if (extra := cache.get_seq_length() - prompt.shape[1]) > 0:
            cache.crop(-extra)
        token, tokens = start, [start]
        for _ in range(steps):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        return torch.cat(tokens[:steps], 1)

    return call


def memory_probe(path: str, window: list[int], decode_steps: int, threads: int) -> dict:
    """Load a checkpoint folder, evaluate one window, decode some tokens: what `memory` measures.

    Args:
        path: checkpoint folder, dense or compressed.
        window: token ids.
        decode_steps: tokens to generate after the window.
        threads: of torch and of the native kernels.
    """
    from ..integrations.transformers import load_compressed

    torch.set_num_threads(threads)
    model = load_compressed(Path(path), dtype=torch.float32)
    ids = torch.tensor([window])
    nll = perplexity(model, ids).nll
    tokens = decode_call(model, ids[:, : max(1, ids.shape[1] - decode_steps)], decode_steps)()
    return {"nll": nll, "tokens": tokens[0].tolist()}
