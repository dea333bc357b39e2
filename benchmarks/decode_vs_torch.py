"""decode_attention against torch's scaled_dot_product_attention and against reading the same bytes.

    python benchmarks/decode_vs_torch.py [--lengths 4096 32768] [--caches float32 bfloat16 int8]

Everything takes turns in one run: medians, ratios. Our caches rotate through more memory than the
last-level cache holds, as in a model whose weights pass between two steps; torch has one set, which
favours it. torch runs both ways: with enable_gqa, and on keys expanded to all heads beforehand (not
timed). It has no int8 cache, so int8 is compared with our bfloat16. "reading" is a kernel that only
reads the bytes of K and V, on the same threads.

To see both without AVX-512 set, before the start: GENAI_PERF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf._backends import native

ROTATED_BYTES = 192 << 20
QUANTIZED = ("int8", "float8_e4m3fn")


class Subject:
    """One cache type and length: its caches, and the calls that are timed over each of them."""

    def __init__(self, name: str, length: int, a):
        dtype = getattr(torch, name)
        q_dtype = torch.bfloat16 if name in QUANTIZED else dtype
        shape = (a.batch, length, a.heads_k, a.dim)
        self.name, self.length = name, length
        self.bytes = 2 * a.batch * length * a.heads_k * a.dim * dtype.itemsize
        self.q = torch.randn(a.batch, 1, a.heads, a.dim, dtype=q_dtype)
        self.lengths = torch.full((a.batch,), length, dtype=torch.int32)
        self.scales = {}
        if name in QUANTIZED:
            scale = torch.full((a.heads_k,), 0.02)
            self.scales = {"k_scale": scale, "v_scale": scale}
        count = max(1, -(-ROTATED_BYTES // self.bytes))
        self.caches = [[self._cache(shape, dtype) for _ in "kv"] for _ in range(count)]
        self.table, self.pages = None, None
        if a.page_size:
            pages = length // a.page_size
            table = torch.randperm(a.batch * pages, dtype=torch.int32).view(a.batch, pages)
            self.table = table
            self.pages = [[x.view(-1, a.page_size, *x.shape[2:]) for x in kv] for kv in self.caches]
        self.group = a.heads // a.heads_k
        self.theirs = self.expanded = None
        if name not in QUANTIZED:
            self.theirs = [[x.transpose(1, 2).contiguous() for x in kv] for kv in self.caches[:1]]
            self.expanded = [[x.repeat_interleave(self.group, 1) for x in kv] for kv in self.theirs]

    @staticmethod
    def _cache(shape, dtype):
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype)
        return torch.randn(shape).to(dtype)

    def ours(self) -> int:
        for k, v in self.caches:
            gp.decode_attention(self.q, k, v, cache_seqlens=self.lengths, **self.scales)
        return len(self.caches)

    def paged(self) -> int:
        for k, v in self.pages:
            gp.decode_attention(self.q, k, v, cache_seqlens=self.lengths, block_table=self.table,
                                **self.scales)  # fmt: skip
        return len(self.pages)

    def read(self) -> int:
        for kv in self.caches:
            for x in kv:
                native.lib().read_memory(x.data_ptr(), x.nbytes, native.threads())
        return len(self.caches)

    def torch_gqa(self) -> int:
        q = self.q.transpose(1, 2)
        for k, v in self.theirs:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return len(self.theirs)

    def torch_expanded(self) -> int:
        q = self.q.transpose(1, 2)
        for k, v in self.expanded:
            F.scaled_dot_product_attention(q, k, v)
        return len(self.expanded)

    def calls(self) -> dict:
        found = {"ours": self.ours, "read": self.read}
        if self.pages:
            found["paged"] = self.paged
        if self.theirs:
            found |= {"torch gqa": self.torch_gqa, "torch expanded": self.torch_expanded}
        return found


@torch.no_grad()
def interleaved(subjects, repeats: int) -> dict:
    """Median seconds of a call by subject and name, all taking turns."""
    calls = {(s.name, name): call for s in subjects for name, call in s.calls().items()}
    times = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for key, call in calls.items():
            start = time.perf_counter()
            count = call()
            times[key].append((time.perf_counter() - start) / count)
    return {key: statistics.median(t) for key, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--caches", nargs="+",
                        default=["float32", "bfloat16", "int8", "float8_e4m3fn"])  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--heads-k", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16, help="0: no paged run")
    parser.add_argument("--repeats", type=int, default=7)
    a = parser.parse_args()
    theirs = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    print(f"ours {native.lib().isa()}, {theirs}, {torch.get_num_threads()} threads, "
          f"batch {a.batch}, {a.heads}/{a.heads_k} heads, dim {a.dim}")  # fmt: skip
    for length in a.lengths:
        subjects = [Subject(name, length, a) for name in a.caches]
        t = interleaved(subjects, a.repeats)
        for s in subjects:
            ours, read = t[s.name, "ours"], t[s.name, "read"]
            line = [
                f"{s.name} s{length}: {1e3 * ours:.3f} ms, {s.bytes / ours / 1e9:.1f} GB/s = "
                f"{100 * read / ours:.0f} % of reading ({s.bytes / read / 1e9:.1f} GB/s)"
            ]
            if s.pages:
                line.append(f"paged {100 * ours / t[s.name, 'paged']:.0f} % of that speed")
            if s.theirs:
                line += [f"{t[s.name, name] / ours:.2f}x {name}"
                         for name in ("torch gqa", "torch expanded")]  # fmt: skip
            elif ("bfloat16", "ours") in t:
                line.append(f"{t['bfloat16', 'ours'] / ours:.2f}x our bfloat16")
            print(", ".join(line), flush=True)


if __name__ == "__main__":
    main()
