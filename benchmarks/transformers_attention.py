"""A transformers model with attn_implementation genai_perf, sdpa and eager: interleaved medians.

    python benchmarks/transformers_attention.py [--dtype float32] [--seqlens 256 1024]

Prefill: one forward of the model without a cache, tokens per second. Padded: the same with a batch
of four whose lengths run from a half to the whole, real tokens per second. Train: forward, loss and
backward. Decode: one token after the prompt, milliseconds. Ratios are of the medians, above 1 where
genai_perf is faster. To see both without AVX-512: GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import genai_perf.integrations.transformers  # noqa: F401  (registers the name)
from genai_perf._backends import native
from genai_perf.bench.timer import interleave
from genai_perf.models import tiny_python_lm

NAMES = ("genai_perf", "sdpa", "eager")


def interleaved(calls: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each call, in turns."""
    found = interleave(calls, rounds=repeats, warmup_seconds=0, min_sample_seconds=0)
    return {name: samples.median for name, samples in found.items()}


def prefill(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def train(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def decode(model, ids):
    """A call that takes one token more after the prompt, and takes it back."""
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values

    def step():
        with torch.no_grad():
            model(ids[:, :1], past_key_values=past, use_cache=True)
        past.crop(-1)

    return step


def show(what: str, tokens: int, seconds: dict[str, float]) -> None:
    ours = seconds["genai_perf"]
    speeds = ", ".join(f"{name} {tokens / s:,.0f}" for name, s in seconds.items())
    ratios = ", ".join(f"{s / ours:.2f}x {name}" for name, s in seconds.items() if s is not ours)
    print(f"{what}: {speeds} tokens/s; {ratios}", flush=True)


def measure(models: dict, seqlen: int, head: str, what: list[str], repeats: int) -> None:
    ids = torch.randint(1, 1000, (1, seqlen))
    if "prefill" in what:
        calls = {name: lambda m=m: prefill(m, ids) for name, m in models.items()}
        show(f"{head} prefill", seqlen, interleaved(calls, repeats))
    if "padded" in what:
        many = torch.randint(1, 1000, (4, seqlen))
        lengths = torch.linspace(seqlen / 2, seqlen, 4).long()
        mask = (torch.arange(seqlen) >= seqlen - lengths[:, None]).long()
        calls = {name: lambda m=m: prefill(m, many, mask) for name, m in models.items()}
        show(f"{head} x 4 padded prefill", int(lengths.sum()), interleaved(calls, repeats))
    if "train" in what:
        calls = {name: lambda m=m: train(m, ids) for name, m in models.items()}
        show(f"{head} train", seqlen, interleaved(calls, repeats))
    if "decode" in what:
        calls = {name: decode(m, ids) for name, m in models.items()}
        show(f"{head} decode", 1, interleaved(calls, 10 * repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(tiny_python_lm()))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", nargs="+", default=["prefill", "padded", "train", "decode"])
    a = parser.parse_args()
    logging.disable_progress_bar()
    theirs = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    print(f"ours {native.lib().isa()}, {theirs}, {torch.get_num_threads()} threads")
    for dtype in a.dtype:
        models = {
            name: AutoModelForCausalLM.from_pretrained(
                a.model, dtype=getattr(torch, dtype), attn_implementation=name
            )
            for name in NAMES
        }
        for seqlen in a.seqlens:
            measure(models, seqlen, f"{dtype} {seqlen}", a.what, a.repeats)


if __name__ == "__main__":
    main()
