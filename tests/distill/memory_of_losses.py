"""The extra memory of a loss and its gradients; it runs in a fork of its own."""

import resource
from functools import partial

import psutil
import torch
import torch.nn.functional as F

from genai_perf.distill import fused_linear_distillation_loss


def extra_bytes(how: str, tokens: int, vocab: int, hidden: int = 64, threads: int = 2) -> int:
    """Growth of the peak beyond inputs and the gradients of the student's two tensors."""
    torch.set_num_threads(threads)
    h, th = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    w, tw = torch.randn(vocab, hidden) / 8, torch.randn(vocab, hidden) / 8
    h.requires_grad_(), w.requires_grad_()
    fused = partial(fused_linear_distillation_loss, chunk_bytes=32 << 20)
    call = {"naive": naive, "fused": fused}[how]
    for x in (h, w):
        x.grad = torch.zeros_like(x)  # the gradients' own memory, before the count starts
    call(h[:32], w[:512], th[:32], tw[:512]).backward()  # what libraries keep from a first call
    before = psutil.Process().memory_info().rss
    h.grad = w.grad = None
    call(h, w, th, tw).backward()
    return _peak() - before


def naive(h, w, th, tw):
    s = F.log_softmax(F.linear(h, w), -1)
    with torch.no_grad():
        t = F.log_softmax(F.linear(th, tw), -1)
    return F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
