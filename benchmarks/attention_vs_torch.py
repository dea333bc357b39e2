"""attention against torch's scaled_dot_product_attention: interleaved runs, medians, ratios.

    python benchmarks/attention_vs_torch.py [--dtype float32] [--seqlens 512 1024] [--dims 64 128]
    python benchmarks/attention_vs_torch.py --memory 4096 8192 16384

The second prints what forward and backward need beyond inputs, outputs and gradients, each in a
process of its own, beside torch's kernel and its path with the score matrix (forward only).

To see both without AVX-512 set, before the start: GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf._backends import native


def interleaved(calls: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each call, taking turns so that all see the same machine."""
    times = {name: [] for name in calls}
    for call in (*calls.values(), *calls.values()):
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(batch, seqlen, heads, heads_k, dim, dtype, causal, repeats) -> dict[str, float]:
    ours = [
        torch.randn(batch, seqlen, h, dim, dtype=dtype, requires_grad=True)
        for h in (heads, heads_k, heads_k)
    ]
    theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in ours]
    dout = torch.randn(batch, seqlen, heads, dim, dtype=dtype)
    dout_t = dout.transpose(1, 2).contiguous()

    def attention():
        return gp.attention(*ours, causal=causal)

    def sdpa():
        return F.scaled_dot_product_attention(
            *theirs, is_causal=causal, enable_gqa=heads != heads_k
        )

    def forward(function):
        with torch.no_grad():
            function()

    return interleaved(
        {
            "ours fwd": lambda: forward(attention),
            "torch fwd": lambda: forward(sdpa),
            "ours fwd+bwd": lambda: torch.autograd.grad(attention(), ours, dout),
            "torch fwd+bwd": lambda: torch.autograd.grad(sdpa(), theirs, dout_t),
        },
        repeats,
    )


def extra_memory(path: str, seqlen: int) -> int:
    """Peak bytes of a call on one head of 64 beyond its tensors; run in a fresh process."""
    x = [torch.randn(1, seqlen, 1, 64, requires_grad=path != "math") for _ in range(3)]
    dout = torch.randn(1, seqlen, 1, 64)

    def call(tensors, upstream):
        if path == "ours":
            out = gp.attention(*tensors)
        else:
            backend = torch.nn.attention.SDPBackend
            with torch.nn.attention.sdpa_kernel(
                backend.MATH if path == "math" else backend.FLASH_ATTENTION
            ):
                out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors))
            out = out.transpose(1, 2)
        if path != "math":
            torch.autograd.grad(out, tensors, upstream)

    call([t[:, :64] for t in x], dout[:, :64])  # libraries load, threads start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(x, dout)
    tensors = (1 if path == "math" else 4) * dout.nbytes
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - tensors


def print_memory(seqlens: list[int]) -> None:
    for seqlen in seqlens:
        found = {}
        for path in ("ours", "flash", "math"):
            code = f"print(__import__('attention_vs_torch').extra_memory({path!r}, {seqlen}))"
            done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], text=True,
                                  capture_output=True, check=True)  # fmt: skip
            found[path] = int(done.stdout) / 2**20
        print(f"memory float32 d64 s{seqlen}, one head: "
              f"ours {found['ours']:.1f} MiB, "
              f"torch's kernel {found['flash']:.1f} MiB, score matrix {found['math']:.1f} MiB",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--heads-k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs="+", type=int, metavar="SEQLEN")
    a = parser.parse_args()
    if a.memory:
        print_memory(a.memory)
        return
    theirs = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    print(f"ours {native.lib().isa()}, {theirs}, {torch.get_num_threads()} threads")
    for dtype in a.dtype:
        for dim in a.dims:
            for seqlen in a.seqlens:
                for causal in (False, True):
                    t = measure(a.batch, seqlen, a.heads, a.heads_k, dim, getattr(torch, dtype),
                                causal, a.repeats)  # fmt: skip
                    print(f"{dtype} d{dim} s{seqlen} {'causal' if causal else 'full'}:", *(
                        f"{what} {1e3 * t['ours ' + what]:.2f} ms = "
                        f"{t['torch ' + what] / t['ours ' + what]:.2f}x torch"
                        for what in ("fwd", "fwd+bwd")), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
