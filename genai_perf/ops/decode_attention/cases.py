"""The cases that the tests and benchmarks of decode attention share."""

from dataclasses import dataclass

import torch

SCALED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...] = (64, 17)  # keys in the cache of each sequence, padding included
    seqlen_q: int = 1
    nheads: int = 4
    nheads_k: int = 2
    headdim: int = 64
    headdim_v: int | None = None  # None: headdim
    page_size: int | None = None  # None: contiguous
    spare: int = 3  # rows of capacity past the longest sequence
    shuffled: bool = False  # contiguous: cache_batch_idx into a larger cache
    leftpad: tuple[int, ...] | None = None
    seqlen_new: int | None = None  # keys to append; None: k and v are not given
    rotary_dim: int = 0
    rotary_interleaved: bool = True
    rotary_shift: int | None = None  # rotary_seqlens is cache_seqlens plus this
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    alibi: int = 0  # dimensions of alibi_slopes: 0 none, 1 (nheads,), 2 (batch, nheads)
    sinks: bool = False
    num_splits: int = 0
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    scale_dims: int = 1  # of k_scale and v_scale, for a cache that has them
    tags: tuple[str, ...] = ()


def _edge(name: str, **fields) -> Case:
    return Case(name, tags=("edge",), **fields)


SMOKE = (
    Case("plain", tags=("smoke",)),
    Case("llama", (70, 129), nheads=8, headdim=128, page_size=16, seqlen_new=1, rotary_dim=128,
         rotary_interleaved=False, causal=True, tags=("smoke",)),
    Case("bf16", (200, 31), nheads=8, dtype=torch.bfloat16, tags=("smoke",)),
    Case("int8", (130, 64), nheads=8, dtype=torch.bfloat16, cache_dtype=torch.int8, seqlen_new=1,
         page_size=8, tags=("smoke",)),
)  # fmt: skip
EDGE = (
    _edge("nothing_cached", lengths=(0, 0)),
    _edge("one_key", lengths=(1, 0, 2), nheads=1, nheads_k=1, headdim=8),
    _edge("dim_1", lengths=(9, 70), headdim=1, headdim_v=3),
    _edge("dim_40", lengths=(90, 7), headdim=40, headdim_v=24, page_size=5),
    _edge("dim_111", lengths=(130, 40, 97), headdim=111, headdim_v=128, nheads=6),
    _edge("dim_256", lengths=(65, 64), headdim=256, nheads=2, nheads_k=1),
    _edge("single_heads", lengths=(300, 63), nheads=3, nheads_k=3, headdim=32),
    _edge("group_of_2", lengths=(77,), nheads=4, nheads_k=2, headdim=96),
    _edge("group_of_7", lengths=(100, 3), nheads=7, nheads_k=1, headdim=32),
    _edge("group_of_6", lengths=(100, 3), nheads=12, nheads_k=2, headdim=16),
    _edge("parts", lengths=(1300, 512, 513, 2), nheads=5, nheads_k=1, headdim=16),
    _edge("fixed_splits", lengths=(700, 1, 65), headdim=32, num_splits=3),
    _edge("many_splits", lengths=(700, 20), headdim=16, num_splits=50),
    _edge("page_1", lengths=(150, 70), headdim=32, page_size=1),
    _edge("page_3", lengths=(150, 70), headdim=32, page_size=3),
    _edge("page_256", lengths=(257, 600), headdim=16, page_size=256),
    _edge("rows_by_index", lengths=(40, 80, 3), headdim=32, shuffled=True, seqlen_new=2),
    _edge("leftpad", lengths=(90, 64, 8), leftpad=(10, 0, 8), headdim=32),
    _edge("leftpad_paged", lengths=(90, 64), leftpad=(70, 63), headdim=32, page_size=4,
          seqlen_new=1, causal=True),
    _edge("append_into_nothing", lengths=(0, 5), seqlen_new=3, seqlen_q=3, causal=True),
    _edge("append_none", lengths=(7, 5), seqlen_new=0),
    _edge("prefill", lengths=(0, 100), seqlen_new=70, seqlen_q=70, causal=True, headdim=32,
          page_size=16),
    _edge("queries_causal", lengths=(100, 2), seqlen_q=5, causal=True, headdim=32),
    _edge("queries_full", lengths=(100, 20), seqlen_q=9, headdim=32, nheads=6),
    _edge("queries_blind", lengths=(3, 0), seqlen_q=8, causal=True, headdim=16),
    _edge("rotary_interleaved", lengths=(30, 0), seqlen_new=2, seqlen_q=2, rotary_dim=16,
          causal=True, headdim=40),
    _edge("rotary_not_causal", lengths=(30, 4), seqlen_new=3, seqlen_q=3, rotary_dim=32,
          rotary_interleaved=False, headdim=32),
    _edge("rotary_elsewhere", lengths=(30, 9), seqlen_new=2, seqlen_q=2, rotary_dim=32,
          window_size=(20, 0), rotary_shift=-7, headdim=32, leftpad=(5, 0)),
    _edge("window_left", lengths=(300, 20), window_size=(50, None), headdim=32),
    _edge("window_both", lengths=(300, 90), seqlen_q=7, window_size=(99, 2), headdim=32,
          leftpad=(3, 50)),
    _edge("window_far", lengths=(1500,), window_size=(30, 0), headdim=16, num_splits=2),
    _edge("softcap", lengths=(300, 20), softcap=3.0, headdim=32),
    _edge("alibi", lengths=(300, 20), seqlen_q=3, alibi=1, causal=True, headdim=32),
    _edge("alibi_by_batch", lengths=(90, 20), alibi=2, nheads=3, nheads_k=1, headdim=16),
    _edge("sinks", lengths=(300, 0), sinks=True, headdim=32),
    _edge("everything", lengths=(200, 33), leftpad=(4, 0), seqlen_q=3, seqlen_new=3, page_size=7,
          rotary_dim=16, window_size=(120, 1), softcap=5.0, alibi=2, sinks=True, headdim=24,
          nheads=6, num_splits=2),
    _edge("int8_float_queries", lengths=(130, 9), cache_dtype=torch.int8, headdim=48, scale_dims=2),
    _edge("int8_odd", lengths=(70, 9), cache_dtype=torch.int8, headdim=21, seqlen_new=2),
    _edge("fp8", lengths=(130, 9), cache_dtype=torch.float8_e4m3fn, headdim=64, seqlen_new=2,
          page_size=3, scale_dims=2),
    _edge("fp8_odd", lengths=(70, 9), cache_dtype=torch.float8_e4m3fn, headdim=21),
)  # fmt: skip
BENCH = tuple(
    Case(f"{name}_{length}", (length,), nheads=32, nheads_k=8, headdim=128, dtype=dtype,
         cache_dtype=cache, tags=("bench",))
    for name, dtype, cache in (
        ("fp32", torch.float32, None),
        ("bf16", torch.bfloat16, None),
        ("int8", torch.bfloat16, torch.int8),
        ("fp8", torch.bfloat16, torch.float8_e4m3fn),
    )
    for length in (4096, 32768)
)  # fmt: skip
MODEL = (
    Case("llama_8b_step", (1024, 3000, 17, 500), nheads=32, nheads_k=8, headdim=128, page_size=16,
         seqlen_new=1, rotary_dim=128, rotary_interleaved=False, causal=True,
         dtype=torch.bfloat16, tags=("model", "bench")),
)  # fmt: skip
CASES = SMOKE + EDGE + BENCH + MODEL


def make_inputs(case: Case, device: str = "cpu", seed: int = 0, poison: float = torch.nan) -> dict:
    """The keyword arguments of `genai_perf.decode_attention` for a case, normal and seeded.

    What the call must not read (rows past a sequence's keys and before its padding ends, pages and
    rows that belong to nobody) holds `poison`.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, new = len(case.lengths), case.seqlen_new or 0
    dim_v = case.headdim if case.headdim_v is None else case.headdim_v
    cache_dtype = case.cache_dtype or case.dtype

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def order(n):  # apart, so that the numbers in a cache do not depend on its layout
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))

    q = normal(batch, case.seqlen_q, case.nheads, case.headdim)
    room = max(case.lengths) + new + case.spare
    pages = None if case.page_size is None else -(-room // case.page_size)
    room = room if pages is None else pages * case.page_size
    dims = (case.headdim, dim_v)
    logical = [normal(batch, room, case.nheads_k, dim) for dim in dims]
    fresh = [normal(batch, new, case.nheads_k, dim) for dim in dims]
    scales = [None, None]
    if cache_dtype in SCALED:
        shape = (batch, case.nheads_k)[2 - case.scale_dims :]
        scales = [4 / SCALED[cache_dtype] * (1 + torch.rand(shape, generator=generator))
                  for _ in dims]  # fmt: skip
    by_index, table = None, None
    if pages is not None:
        table = order(batch * pages + 2)[: batch * pages].view(batch, pages).to(torch.int32)
    elif case.shuffled:
        by_index = order(batch + 2)[:batch].to(torch.int32)
    first = case.leftpad or (0,) * batch
    caches = []
    for x, scale in zip(logical, scales, strict=True):
        if scale is not None:
            x = x / (scale if scale.dim() == 1 else scale[:, None])[..., None]
            x = x.round().clamp(-127, 127) if cache_dtype == torch.int8 else x.clamp(-448, 448)
        for b, length in enumerate(case.lengths):
            x[b, : first[b]] = poison
            x[b, length:] = poison
        if table is not None:
            cache = x.new_full((batch * pages + 2, case.page_size, *x.shape[2:]), poison)
            cache[table.flatten().long()] = x.reshape(-1, case.page_size, *x.shape[2:])
        elif by_index is not None:
            cache = x.new_full((batch + 2, *x.shape[1:]), poison)
            cache[by_index.long()] = x
        else:
            cache = x
        if cache_dtype == torch.int8:
            cache = cache.nan_to_num(127)
        caches.append(cache.to(cache_dtype))
    rotary = {}
    if case.rotary_dim:
        half = case.rotary_dim // 2
        angle = torch.arange(room + 5)[:, None] * 100.0 ** -(torch.arange(half) / half)
        rotary = {
            "rotary_cos": angle.cos().to(case.dtype),
            "rotary_sin": angle.sin().to(case.dtype),
        }
        if case.rotary_shift is not None:
            at = (torch.tensor(case.lengths) + case.rotary_shift).clamp(min=0)
            rotary["rotary_seqlens"] = at.to(torch.int32)
    slopes = 2.0 ** -torch.arange(1, case.nheads + 1, dtype=torch.float32)
    by_batch = torch.linspace(1, 2, batch)[:, None]
    appended = case.seqlen_new is not None
    inputs = {
        "q": q.to(case.dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32),
        "block_table": table,
        "k": fresh[0].to(case.dtype) if appended else None,
        "v": fresh[1].to(case.dtype) if appended else None,
        **rotary,
        "rotary_interleaved": case.rotary_interleaved,
        "cache_batch_idx": by_index,
        "cache_leftpad": torch.tensor(first, dtype=torch.int32) if case.leftpad else None,
        "k_scale": scales[0],
        "v_scale": scales[1],
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "alibi_slopes": (None, slopes, by_batch * slopes)[case.alibi],
        "sinks": normal(case.nheads).to(case.dtype) if case.sinks else None,
        "num_splits": case.num_splits,
    }
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


def cost(case: Case) -> tuple[int, int]:
    """(flops without masks, bytes of the keys and values that are read once)."""
    dim_v = case.headdim if case.headdim_v is None else case.headdim_v
    first = case.leftpad or (0,) * len(case.lengths)
    keys = sum(case.lengths) - sum(first) + len(first) * (case.seqlen_new or 0)
    size = (case.cache_dtype or case.dtype).itemsize
    flops = 2 * case.seqlen_q * case.nheads * keys * (case.headdim + dim_v)
    return flops, keys * case.nheads_k * (case.headdim + dim_v) * size
