"""Peak memory of attention beyond its inputs, by length: ours, torch's kernel, its math path.

    python benchmarks/attention_memory.py [--seqlens 2048 16384] [--heads 1] [--dtype float32]

Each figure is of a call in a fresh process, after one of 64 tokens that loads what it needs: how
far the peak of resident memory rose above what was resident before, our scratch, the output and
the gradients included. Linux.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import genai_perf as gp
from genai_perf.bench.memory import FreshProcesses
from genai_perf.bench.probe import peak_bytes, reset_peak

KERNELS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch math": SDPBackend.MATH}
NAMES = ("genai_perf", *KERNELS)
PHASES = ("forward", "forward+backward")


def call(name: str, phase: str, tensors: list[torch.Tensor]) -> object:
    """out, and with a backward the gradients; tensors are q, k, v, dout."""
    q, k, v, dout = tensors
    backward = phase == PHASES[1]
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    if name in KERNELS:
        with sdpa_kernel(KERNELS[name]):
            out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
            out = out.transpose(1, 2)
    else:
        out = gp.attention(*leaves)
    return (out, *torch.autograd.grad(out, leaves, dout)) if backward else out


def extra_bytes(name: str, phase: str, seqlen: int, heads: int, dtype: str) -> int:
    def tensors(rows: int) -> list[torch.Tensor]:
        return [torch.randn(1, rows, heads, 64).to(getattr(torch, dtype)) for _ in range(4)]

    call(name, phase, tensors(64))
    given = tensors(seqlen)
    before = reset_peak()
    kept = call(name, phase, given)
    found = peak_bytes() - before
    del kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    here = Path(__file__).resolve()
    preload = ("torch", "genai_perf", here.stem)
    print(f"MiB beyond the inputs, {a.heads} head(s) of 64, {a.dtype}, torch {torch.__version__}")
    print(f"{'':30}" + "".join(f"{n:>10}" for n in a.seqlens))
    with FreshProcesses(preload, (here.parent,)) as fresh:
        for phase in PHASES:
            for name in NAMES:
                row = []
                for seqlen in a.seqlens:
                    given = {"name": name, "phase": phase, "seqlen": seqlen, "heads": a.heads,
                             "dtype": a.dtype}  # fmt: skip
                    row.append(fresh.run(f"{here.stem}:extra_bytes", given).value / 2**20)
                print(f"{name + ', ' + phase:30}" + "".join(f"{x:10.1f}" for x in row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
