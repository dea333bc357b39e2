"""One linear layer from quantized weights against bitsandbytes and torch's dense float32.

    python benchmarks/quant_matmul_vs_peers.py [--shapes 4096x4096] [--rows 1 128] [--rounds 30]

All variants take turns within one run; weights are rotated over several copies, so that none sits
in a cache; ratios are medians of the rounds' own ratios. bitsandbytes' Linear4bit is measured
twice: as it chooses on this processor, and by its path for processors without AVX512-BF16 (fused
and bf16 only in the first case, dequantize and F.linear in the second). To hold ours and torch to
AVX2: GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
from itertools import cycle

import bitsandbytes
import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf._backends import native
from genai_perf.bench.machine import machine
from genai_perf.bench.timer import compare, interleave

OURS = {
    "nf4": ("nf4", {}),
    "nf4 double": ("nf4", {"double_quant": True}),
    "int4 g128": ("int4", {}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
}


def rotating(copies: list, call):
    """`call(copy)` with another copy each time."""
    turn = cycle(copies)
    return lambda: call(next(turn))


def bnb_layer(weight: torch.Tensor, *, fused: bool | None):
    nf4 = {"quant_type": "nf4", "compress_statistics": False}
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, **nf4)
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, **nf4)
    layer = layer.to("cpu").eval()
    if fused is False:
        layer.support_avx512bf16_for_cpu = False
    return layer


def variants(n: int, k: int, rows: int, dtype: torch.dtype, copies: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    dense = [torch.randn(n, k, generator=generator) / k**0.5 for _ in range(copies)]
    x32 = x.float()
    calls = {"torch dense fp32": rotating(dense, lambda w: F.linear(x32, w))}
    for name, (fmt, options) in OURS.items():
        weights = [gp.quantize(w, fmt, **options) for w in dense]
        calls[f"ours {name}"] = rotating(weights, lambda w: gp.quant_matmul(x, w))
    for name, fused in (("bitsandbytes nf4", None), ("bitsandbytes nf4, no AVX512-BF16", False)):
        layers = [bnb_layer(w.to(dtype), fused=fused) for w in dense]
        calls[name] = rotating(layers, lambda layer: layer(x))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="outputs x inputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    a = parser.parse_args()
    print(machine(), f"ours {native.lib().isa()}, torch {torch.__version__}",
          torch.backends.cpu.get_cpu_capability(), f"bitsandbytes {bitsandbytes.__version__},",
          f"{torch.get_num_threads()} threads", flush=True)  # fmt: skip
    for shape in a.shapes:
        n, k = map(int, shape.split("x"))
        for rows in a.rows:
            for dtype in a.dtypes:
                calls = variants(n, k, rows, getattr(torch, dtype), a.copies)
                with torch.inference_mode():
                    samples = interleave(calls, rounds=a.rounds, budget_seconds=60)
                peers = [name for name in calls if not name.startswith("ours")]
                print(f"\n{n}x{k}, {rows} row(s), {dtype}: ms, and speed over each peer")
                for name, sample in samples.items():
                    ratios = (f"{1 / compare(samples[p], sample).ratio:7.2f}x" for p in peers)
                    print(f"  {name:34s}{1e3 * sample.median:9.3f}  ", *ratios, flush=True)
                print("  peers in order:", "; ".join(peers))


if __name__ == "__main__":
    main()
