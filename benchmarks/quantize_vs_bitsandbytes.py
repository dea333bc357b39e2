"""quantize and dequantize against bitsandbytes' CPU path, in turn within one run.

    python benchmarks/quantize_vs_bitsandbytes.py [--shape 4096 4096] [--rounds 12]

Times are medians of whole calls, the allocation of the result among them; "resident" rows give the
dequantize kernels alone, into memory that is there already. Ratios are medians of the rounds' own
ratios. Write bandwidth is that of torch's fill of resident memory in the same run. Without AVX-512:
GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2,
which bitsandbytes' own dequantize kernels do not heed: they use AVX-512 where the machine has it.
"""

import argparse
import ctypes

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib as bnb_lib

import genai_perf as gp
from genai_perf._backends import native
from genai_perf._backends.native import DTYPE_CODES, lib, pointer, threads
from genai_perf.bench.machine import machine
from genai_perf.bench.timer import compare, interleave

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def nf4_pairs(x: torch.Tensor, name: str, double: bool) -> dict:
    """name -> (ours, theirs, bytes written or None)."""
    w = x.to(DTYPES[name])
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
    qt = gp.quantize(w, "nf4", double_quant=double)
    label = f"nf4 double {name}" if double else f"nf4 {name}"

    def quantize_theirs():
        return bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double)

    return {
        f"quantize {label}": (
            lambda: gp.quantize(w, "nf4", double_quant=double), quantize_theirs, None),
        f"dequantize {label}": (
            lambda: gp.dequantize(qt), lambda: bnb.dequantize_4bit(packed, state), w.nbytes),
    }  # fmt: skip


def resident_pairs(x: torch.Tensor, name: str) -> dict:
    """The dequantize kernels alone, both into one tensor that is there already."""
    out = x.to(DTYPES[name])
    packed, state = bnb.quantize_4bit(out, quant_type="nf4")
    qt = gp.quantize(out, "nf4")
    theirs = getattr(bnb_lib, f"cdequantize_blockwise_cpu_nf4_{name}")
    pointers = [bnb.get_ptr(t) for t in (packed, state.absmax, out)]
    sizes = [ctypes.c_longlong(n) for n in (64, *out.shape)]
    return {
        f"dequantize nf4 {name}, resident": (
            lambda: lib().dequantize_nf4(
                pointer(qt.qdata), pointer(qt.scale), 0, 0, 0, out.numel(), 64, pointer(out),
                DTYPE_CODES[out.dtype], threads()),
            lambda: theirs(*pointers, *sizes), out.nbytes),
    }  # fmt: skip


def int8_pairs(x: torch.Tensor) -> dict:
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.clone())
    qt = gp.quantize(x, "int8")
    return {
        "quantize int8 fp32": (
            lambda: gp.quantize(x, "int8"),
            lambda: torch.ops.bitsandbytes.int8_vectorwise_quant.default(x), None),
        "dequantize int8 fp32": (
            lambda: gp.dequantize(qt),
            lambda: torch.ops.bitsandbytes.int8_vectorwise_dequant.default(codes, absmax),
            x.nbytes),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    a = parser.parse_args()
    x = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    pairs = {}
    for name in DTYPES:
        pairs |= nf4_pairs(x, name, False) | nf4_pairs(x, name, True) | resident_pairs(x, name)
    pairs |= int8_pairs(x)
    resident = torch.empty_like(x)
    print(f"{machine()}, load {machine().load_average}")
    print(f"genai_perf {gp.__version__} {native.lib().isa()}, bitsandbytes "
          f"{bitsandbytes.__version__}, torch {torch.__version__} "
          f"{torch.backends.cpu.get_cpu_capability()}, shape {tuple(a.shape)}")  # fmt: skip
    print(f"{'':36} {'ours':>9} {'theirs':>9} {'ratio':>7}  {'95 % interval':>15}  write share")
    for name, (ours, theirs, written) in pairs.items():
        if a.only not in name:
            continue
        samples = interleave({"ours": ours, "theirs": theirs, "fill": lambda: resident.fill_(1.0)},
                             rounds=a.rounds, warmup_seconds=0.1)  # fmt: skip
        result = compare(samples["ours"], samples["theirs"])
        ours_ms, theirs_ms = (samples[who].median * 1e3 for who in ("ours", "theirs"))
        share = ""
        if written:
            bandwidth = resident.nbytes / samples["fill"].median / 1e9
            share = f"{written / ours_ms / 1e6 / bandwidth:.0%} of {bandwidth:.1f} GB/s"
        print(f"{name:36} {ours_ms:6.2f} ms {theirs_ms:6.1f} ms {result.ratio:6.1f}x  "
              f"[{result.low:5.1f}, {result.high:5.1f}]  {share}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
