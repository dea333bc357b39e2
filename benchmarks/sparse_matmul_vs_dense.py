"""One linear layer from sparse weights against torch's dense float32 and our dense int4.

    python benchmarks/sparse_matmul_vs_dense.py [--shapes 4096x4096 14336x4096] [--rounds 30]

All variants take turns within one run; weights are rotated over several copies, so that none sits
in a cache; ratios are medians of the rounds' own ratios. To hold ours and torch to AVX2:
GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
from itertools import cycle

import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf._backends import native
from genai_perf.bench.machine import machine
from genai_perf.bench.timer import compare, interleave
from genai_perf.formats import sparse, sparse24

VARIANTS = {
    "2:4 fp32": (sparse24.pack, "float32"),
    "2:4 bf16": (sparse24.pack, "bfloat16"),
    "2:4 int8": (sparse24.pack, "int8"),
    "2:4 int4 g128": (sparse24.pack, "int4"),
    "bitmask bf16 50 %": (sparse.pack, "bfloat16"),
    "bitmask int8 50 %": (sparse.pack, "int8"),
}


def rotating(copies: list, call):
    """`call(copy)` with another copy each time."""
    turn = cycle(copies)
    return lambda: call(next(turn))


def halved(dense: torch.Tensor) -> torch.Tensor:
    """2 of every 4 columns at random places: also what 50 % unstructured is measured on."""
    return dense * (torch.rand(*dense.shape[:1], dense.shape[1] // 4, 4).argsort(2) < 2).flatten(1)


def variants(n: int, k: int, copies: int) -> dict:
    torch.manual_seed(0)
    x = torch.randn(1, k)
    dense = [halved(torch.randn(n, k) / k**0.5) for _ in range(copies)]
    calls = {"torch dense fp32": rotating(dense, lambda w: F.linear(x, w))}
    int4 = [gp.quantize(w, "int4") for w in dense]
    calls["ours dense int4 g128"] = rotating(int4, lambda w: gp.quant_matmul(x, w))
    for name, (pack, values) in VARIANTS.items():
        if values.startswith("int"):
            packed = [pack(gp.quantize(w, values)) for w in dense]
        else:
            packed = [pack(w.to(getattr(torch, values))) for w in dense]
        calls[name] = rotating(packed, lambda w: gp.sparse_matmul(x, w))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="outputs x inputs")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=60, help="seconds a shape")
    a = parser.parse_args()
    print(machine(), f"ours {native.lib().isa()}, torch {torch.__version__}",
          torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads",
          flush=True)  # fmt: skip
    for shape in a.shapes:
        n, k = map(int, shape.split("x"))
        calls = variants(n, k, a.copies)
        with torch.inference_mode():
            samples = interleave(calls, rounds=a.rounds, budget_seconds=a.budget)
        print(f"\n{n}x{k}, 1 row: ms, and speed over torch dense fp32 and over our dense int4")
        for name, sample in samples.items():
            peers = ("torch dense fp32", "ours dense int4 g128")
            ratios = (f"{1 / compare(samples[p], sample).ratio:7.2f}x" for p in peers)
            print(f"  {name:24s}{1e3 * sample.median:9.3f}  ", *ratios, flush=True)


if __name__ == "__main__":
    main()
