"""Distillation losses against the naive loss, liger-kernel and TRL: time, memory, gradients' error.

    python benchmarks/distill_vs_peers.py time   [--tokens 64 512] [--hidden 512 1024]
    python benchmarks/distill_vs_peers.py memory  [--tokens 4096]
    python benchmarks/distill_vs_peers.py error

Forward and backward of a head's loss, forward KL, mean over tokens. Peers are left out, with the
reason, where they are not installed or do not run on a CPU: `pip install --no-deps liger-kernel trl
datasets multiprocess dill xxhash pyarrow pandas` beside this package. Times are interleaved,
medians; memory is the growth of the peak in a fresh process beyond inputs, weights and the
gradients that stay.

To see all without AVX-512 set, before the start: GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata

import psutil
import torch
import torch.nn.functional as F

from genai_perf._backends import native
from genai_perf.bench.timer import interleave
from genai_perf.distill import TopK, fused_linear_distillation_loss


def naive(h, w, th, tw):
    """fp32 logits of both, log_softmax, F.kl_div."""
    s = F.log_softmax(F.linear(h, w).float(), -1)
    with torch.no_grad():
        t = F.log_softmax(F.linear(th, tw).float(), -1)
    return F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean()


def naive_fp32(h, w, th, tw):
    """The same with products in fp32, which is what fp32 logits of bf16 inputs are."""
    return naive(h.float(), w.float(), th.float(), tw.float())


def liger(h, w, th, tw):
    """LigerFusedLinearJSDLoss, the chunked loss that Liger has in torch, at beta 0 (forward KL)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0,
                                   compiled=False, chunk_size=256)  # fmt: skip
    return loss(h, w, th, tw, torch.zeros(len(h), dtype=torch.int64))


def trl(h, w, th, tw):
    """ChunkedDivergenceFunction of TRL's DistillationTrainer, in its path without Triton."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 0.0)[0].mean()


CALLS = {"naive": naive, "naive_fp32": naive_fp32, "ours": fused_linear_distillation_loss,
         "liger": liger, "trl": trl}  # fmt: skip


def inputs(tokens: int, vocab: int, hidden: int, teacher: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=g).to(dtype)
    w = (torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(dtype)
    th = torch.randn(tokens, teacher, generator=g).to(dtype)
    tw = (torch.randn(vocab, teacher, generator=g) / teacher**0.5).to(dtype)
    return h.requires_grad_(), w.requires_grad_(), th, tw


def step(call: Callable, tensors) -> None:
    h, w = tensors[:2]
    h.grad = w.grad = None
    call(*tensors).backward()


def usable(names: list[str]) -> dict[str, Callable]:
    """Those that run a small call, with the reason for those that do not."""
    found = {}
    for name in names:
        try:
            step(CALLS[name], inputs(8, 64, 16, 16, torch.float32))
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            print(f"{name}: left out: {str(error).splitlines()[0][:150]}", flush=True)
        else:
            found[name] = CALLS[name]
    return found


def time_command(a) -> None:
    calls = usable(a.calls)
    for dtype in a.dtype:
        for tokens in a.tokens:
            time_one(a, calls, dtype, tokens)


def time_one(a, calls: dict[str, Callable], dtype: str, tokens: int) -> None:
    tensors = inputs(tokens, a.vocab, *a.hidden, getattr(torch, dtype))
    kept = TopK.from_logits(torch.randn(tokens, a.vocab), 64)
    labels = torch.randint(0, a.vocab, (tokens,))

    def labels_alone(h, w, *_):
        return fused_linear_distillation_loss(h, w, labels=labels, alpha=1.0)

    def top_k(h, w, *_):
        return fused_linear_distillation_loss(h, w, teacher=kept)

    calls = {n: c for n, c in calls.items() if n != "naive_fp32" or dtype != "float32"}
    calls |= {"labels alone": labels_alone, "top 64": top_k}
    samples = interleave({n: partial(step, c, tensors) for n, c in calls.items()},
                         rounds=a.rounds, warmup_seconds=0.0)  # fmt: skip
    base = samples["naive"].median
    print(f"{dtype} {tokens} x {a.vocab}, hidden {a.hidden[0]} and {a.hidden[1]}:", *(
        f"{name} {1e3 * s.median:.1f} ms ({s.median / base:.2f}x naive)"
        for name, s in samples.items()), flush=True)  # fmt: skip
    ratio = samples["top 64"].median / samples["labels alone"].median
    print(f"  top 64 over labels alone: {ratio:.3f}", flush=True)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_of(call: str, tokens: int, vocab: int, hidden: list[int], dtype: str) -> int:
    tensors = inputs(tokens, vocab, *hidden, getattr(torch, dtype))
    for x in tensors[:2]:
        x.grad = torch.zeros_like(x)
    small = inputs(64, 512, *hidden, getattr(torch, dtype))
    step(CALLS[call], small)
    before = psutil.Process().memory_info().rss  # the gradients' own memory is part of it
    step(CALLS[call], tensors)
    return peak() - before


def memory_command(a) -> None:
    for dtype in a.dtype:
        for tokens in a.tokens:
            found = {}
            for name in a.calls:
                request = json.dumps([name, tokens, a.vocab, a.hidden, dtype])
                done = subprocess.run([sys.executable, __file__, "one", request],
                                      capture_output=True, text=True)  # fmt: skip
                if done.returncode:
                    print(f"{name}: left out: {done.stderr.strip().splitlines()[-1][:150]}")
                    continue
                found[name] = int(done.stdout.splitlines()[-1])
            print(f"{dtype} {tokens} x {a.vocab}: extra peak", *(
                f"{name} {value / 1e6:.0f} MB ({value / found['naive']:.3f}x naive)"
                for name, value in found.items()), flush=True)  # fmt: skip


def error_command(a) -> None:
    calls = usable([n for n in a.calls if n != "naive"])
    for dtype in a.dtype:
        tensors = inputs(256, 4096, 256, 512, getattr(torch, dtype))
        exact = [x.detach().double().requires_grad_() for x in tensors]
        step(naive64, exact)
        for name, call in {**calls, "naive": naive}.items():
            step(call, tensors)
            errors = [
                ((x.grad.double() - e.grad).norm() / e.grad.norm()).item()
                for x, e in zip(tensors[:2], exact[:2], strict=True)
            ]
            print(f"{dtype} {name}: relative error of dh {errors[0]:.2e}, of dW {errors[1]:.2e}")


def naive64(h, w, th, tw):
    s, t = F.log_softmax(F.linear(h, w), -1), F.log_softmax(F.linear(th, tw).detach(), -1)
    return F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean()


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(memory_of(*json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("time", "memory", "error"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, nargs=2, default=[512, 1024])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--calls", nargs="+", choices=tuple(CALLS), default=list(CALLS))
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    versions = []
    for name in ("liger-kernel", "trl"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    print(f"ours {native.lib().isa()}, torch {torch.__version__} "
          f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
          + ", ".join(versions), flush=True)  # fmt: skip
    {"time": time_command, "memory": memory_command, "error": error_command}[a.what](a)


if __name__ == "__main__":
    main()
