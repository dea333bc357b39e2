"""The cases that the tests and benchmarks of attention share."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    nheads: int = 2
    nheads_k: int = 2
    headdim: int = 64
    headdim_v: int | None = None  # None: headdim
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    alibi: int = 0  # dimensions of alibi_slopes: 0 none, 1 (nheads,), 2 (batch, nheads)
    sinks: bool = False
    bias: str | None = None  # the dimensions that attn_bias has whole: some of "bhqk", others are 1
    mask: str | None = None  # the same, of bool
    block_mask: str | None = None  # the leading dimensions that block_mask has whole, of "bh"
    block_size: tuple[int, int] = (128, 128)
    dropout_p: float = 0.0
    lengths: tuple[tuple[int, int], ...] = ()  # (seqlen_q, seqlen_k) of packed sequences; () dense
    dtype: torch.dtype = torch.float32
    tags: tuple[str, ...] = ()


def _edge(name: str, **fields) -> Case:
    return Case(name, tags=("edge", "grad"), **fields)


SMOKE = (
    Case("square", tags=("smoke", "grad")),
    Case("causal", causal=True, nheads=4, tags=("smoke", "grad")),
    Case("bf16", dtype=torch.bfloat16, causal=True, tags=("smoke", "grad")),
    Case("fp16", dtype=torch.float16, causal=True, tags=("smoke", "grad")),
    Case("blocks", seqlen_q=200, seqlen_k=317, nheads=4, causal=True, tags=("smoke", "grad")),
)
EDGE = (
    _edge("one", seqlen_q=1, seqlen_k=1, nheads=1, nheads_k=1, headdim=8),
    _edge("odd", seqlen_q=5, seqlen_k=7, nheads_k=1, headdim=40),
    _edge("decode", seqlen_q=1, seqlen_k=300, nheads=7, nheads_k=1, causal=True),
    _edge("no_queries", seqlen_q=0, seqlen_k=5, headdim=16),
    _edge("no_keys", seqlen_q=5, seqlen_k=0, headdim=16),
    _edge("no_batch", batch=0, headdim=16),
    _edge("blind_rows", seqlen_q=130, seqlen_k=40, causal=True, headdim=16),
    _edge("blind_tiles", seqlen_q=317, seqlen_k=100, causal=True, headdim=80, headdim_v=32),
    _edge("group_of_7", seqlen_q=33, seqlen_k=65, nheads=14, causal=True, headdim=32),
    _edge("dim_111", seqlen_q=97, seqlen_k=193, headdim=111, headdim_v=128),
    _edge("dim_256", seqlen_q=33, seqlen_k=130, nheads_k=1, headdim=256, causal=True),
    _edge("mla_192_128", seqlen_q=120, seqlen_k=250, headdim=192, headdim_v=128, causal=True),
    _edge(
        "mla_576_512", seqlen_q=20, seqlen_k=100, nheads=4, nheads_k=1, headdim=576, headdim_v=512
    ),
    _edge("dim_1", seqlen_q=9, seqlen_k=9, headdim=1, headdim_v=3),
    _edge("many_strips", seqlen_q=191, seqlen_k=449, nheads=1, nheads_k=1, headdim=24, causal=True),
    _edge("window_left", seqlen_q=150, seqlen_k=300, window_size=(20, None), headdim=32),
    _edge("window_right", seqlen_q=150, seqlen_k=300, window_size=(None, 17), headdim=32),
    _edge("window_both", seqlen_q=330, seqlen_k=330, window_size=(30, 9), headdim=32, nheads_k=1),
    _edge("window_causal", seqlen_q=260, seqlen_k=300, window_size=(64, None), causal=True),
    _edge("window_self", seqlen_q=70, seqlen_k=70, window_size=(0, 0), headdim=16),
    _edge("window_blind", seqlen_q=230, seqlen_k=60, window_size=(5, 3), headdim=16),
    _edge("softcap", seqlen_q=70, seqlen_k=300, softcap=3.0, causal=True, headdim=40),
    _edge("softcap_soft", seqlen_q=33, seqlen_k=33, softcap=50.0, headdim=16),
    _edge("alibi", seqlen_q=130, seqlen_k=300, nheads=4, alibi=1, causal=True, headdim=32),
    _edge("alibi_by_batch", seqlen_q=97, seqlen_k=45, nheads=3, nheads_k=1, alibi=2, headdim=32),
    _edge("sinks", seqlen_q=130, seqlen_k=300, nheads=8, sinks=True, causal=True, headdim=32),
    _edge("sinks_blind", seqlen_q=130, seqlen_k=40, sinks=True, causal=True, headdim=16),
    _edge("sinks_no_keys", seqlen_q=5, seqlen_k=0, sinks=True, headdim=16),
    _edge(
        "gpt_oss",
        seqlen_q=200,
        seqlen_k=200,
        nheads=8,
        nheads_k=1,
        sinks=True,
        causal=True,
        window_size=(127, None),
    ),
    _edge(
        "gemma_2",
        seqlen_q=150,
        seqlen_k=150,
        nheads=4,
        softcap=50.0,
        causal=True,
        window_size=(63, None),
        headdim=96,
    ),
    _edge(
        "everything",
        seqlen_q=70,
        seqlen_k=130,
        nheads=16,
        softcap=5.0,
        alibi=2,
        sinks=True,
        window_size=(99, 30),
        headdim=24,
    ),
    _edge("bias", seqlen_q=130, seqlen_k=300, nheads=4, bias="bhqk", causal=True, headdim=32),
    _edge("bias_t5", seqlen_q=100, seqlen_k=200, nheads=4, bias="hqk", headdim=32),
    _edge("bias_by_batch", seqlen_q=97, seqlen_k=45, nheads=4, bias="bqk", headdim=16),
    _edge("bias_shared", seqlen_q=40, seqlen_k=210, nheads=4, bias="qk", headdim=16),
    _edge("bias_of_keys", seqlen_q=97, seqlen_k=45, nheads=3, nheads_k=1, bias="k", headdim=16),
    _edge(
        "bias_of_queries", seqlen_q=50, seqlen_k=210, nheads=3, nheads_k=1, bias="hq", headdim=16
    ),
    _edge(
        "bias_everything",
        seqlen_q=50,
        seqlen_k=210,
        nheads=8,
        bias="hqk",
        softcap=5.0,
        alibi=1,
        sinks=True,
        window_size=(150, 20),
        headdim=16,
    ),
    _edge("mask", seqlen_q=130, seqlen_k=300, nheads=4, mask="bhqk", headdim=32),
    _edge("mask_padding", seqlen_q=60, seqlen_k=60, nheads=4, mask="bk", causal=True, headdim=32),
    _edge(
        "packed",
        lengths=((5, 5), (0, 7), (130, 300), (7, 0), (1, 65), (0, 0)),
        nheads=4,
        causal=True,
        headdim=32,
    ),
    _edge(
        "packed_rules",
        lengths=((150, 150), (33, 97), (97, 33)),
        nheads=8,
        softcap=5.0,
        alibi=2,
        sinks=True,
        window_size=(60, None),
        headdim=16,
    ),
    _edge("dropout", seqlen_q=70, seqlen_k=301, nheads=4, dropout_p=0.3, causal=True, headdim=32),
    _edge(
        "dropout_everything",
        lengths=((70, 70), (0, 3), (33, 97)),
        nheads=4,
        dropout_p=0.5,
        softcap=5.0,
        alibi=2,
        sinks=True,
        window_size=(60, 9),
        headdim=16,
    ),
    _edge("dropout_bias", seqlen_q=50, seqlen_k=70, nheads=4, dropout_p=0.1, bias="qk", headdim=16),
    _edge(
        "blocks_64",
        seqlen_q=300,
        seqlen_k=600,
        nheads=4,
        block_mask="bh",
        block_size=(64, 64),
        headdim=16,
    ),
    _edge(
        "blocks_causal",
        seqlen_q=400,
        seqlen_k=410,
        nheads=4,
        nheads_k=1,
        block_mask="h",
        causal=True,
        headdim=32,
    ),
    _edge(
        "blocks_uneven",
        seqlen_q=130,
        seqlen_k=290,
        block_mask="",
        block_size=(7, 33),
        headdim=16,
        bias="hqk",
        dropout_p=0.2,
        sinks=True,
    ),
    _edge("packed_empty", lengths=((0, 0),), headdim=16),
)
BENCH = tuple(
    Case(
        f"{str(dtype)[6:]}_s{seqlen}_d{dim}_{'causal' if causal else 'full'}",
        batch=1, seqlen_q=seqlen, seqlen_k=seqlen, nheads=8, nheads_k=8, headdim=dim,
        causal=causal, dtype=dtype, tags=("bench", "grad"),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for dim in (64, 128)
    for seqlen in (512, 1024, 2048, 4096)
    for causal in (False, True)
)  # fmt: skip
MODEL = (
    Case("tiny_python_lm", batch=8, seqlen_q=512, seqlen_k=512, nheads=4, causal=True,
         tags=("model", "bench", "grad")),
    Case("llama_8b_layer", batch=1, seqlen_q=1024, seqlen_k=1024, nheads=32, nheads_k=8,
         headdim=128, causal=True, dtype=torch.bfloat16, tags=("model", "bench", "grad")),
)  # fmt: skip
CASES = SMOKE + EDGE + BENCH + MODEL


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict:
    """The keyword arguments of `genai_perf.attention` for a case, normal and seeded."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dim_v = case.headdim if case.headdim_v is None else case.headdim_v

    def normal(*shape):
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return x.to(case.dtype)

    whole = dict(zip("bhqk", (case.batch, case.nheads, case.seqlen_q, case.seqlen_k), strict=True))

    def broadcast(dims):
        return normal(*(size if d in dims else 1 for d, size in whole.items()))

    attn_bias = None
    if case.bias is not None:
        attn_bias = broadcast(case.bias)
    elif case.mask is not None:
        attn_bias = broadcast(case.mask) > 0
    extra = {}
    if case.block_mask is not None:
        counts = (-(-case.seqlen_q // case.block_size[0]), -(-case.seqlen_k // case.block_size[1]))
        heads = (size if d in case.block_mask else 1 for d, size in list(whole.items())[:2])
        extra = {"block_mask": normal(*heads, *counts) > 0.3, "block_size": case.block_size}
    if case.dropout_p:
        state = torch.tensor([-123456789123456789, 2**40 + 5], device=device)
        extra |= {"dropout_p": case.dropout_p, "rng_state": state}
    slopes = 2.0 ** -torch.arange(1, case.nheads + 1, device=device, dtype=torch.float32)
    batch = len(case.lengths) or case.batch
    by_batch = torch.linspace(1, 2, batch, device=device)[:, None]
    rows_q, rows_k, cu_seqlens = (batch, case.seqlen_q), (batch, case.seqlen_k), {}
    if case.lengths:
        ends = torch.tensor(((0, 0), *case.lengths), device=device).cumsum(0).to(torch.int32)
        cu_seqlens = {
            "cu_seqlens_q": ends[:, 0].contiguous(),
            "cu_seqlens_k": ends[:, 1].contiguous(),
        }
        rows_q, rows_k = ((int(total),) for total in ends[-1])
    return {
        "q": normal(*rows_q, case.nheads, case.headdim),
        "k": normal(*rows_k, case.nheads_k, case.headdim),
        "v": normal(*rows_k, case.nheads_k, dim_v),
        **cu_seqlens,
        **extra,
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "alibi_slopes": (None, slopes, by_batch * slopes)[case.alibi],
        "attn_bias": attn_bias,
        "sinks": normal(case.nheads) if case.sinks else None,
    }


def visible_pairs(case: Case) -> int:
    """How many (query, key) pairs of one head the window leaves, over the whole batch."""
    left, right = case.window_size
    right = 0 if case.causal else right

    def pairs(seqlen_q: int, seqlen_k: int) -> int:
        total = 0
        for i in range(seqlen_k - seqlen_q, seqlen_k):
            lo = 0 if left is None else max(i - left, 0)
            hi = seqlen_k if right is None else min(i + right + 1, seqlen_k)
            total += max(hi - lo, 0)
        return total

    if case.lengths:
        return sum(pairs(*lengths) for lengths in case.lengths)
    return case.batch * pairs(case.seqlen_q, case.seqlen_k)


def cost(case: Case) -> tuple[int, int]:
    """(flops of the forward without masked pairs, bytes of q, k, v and out read or written once).

    The backward has 2.5 times the flops.
    """
    dim_v = case.headdim if case.headdim_v is None else case.headdim_v
    flops = 2 * case.nheads * visible_pairs(case) * (case.headdim + dim_v)
    lengths = case.lengths or ((case.seqlen_q, case.seqlen_k),) * case.batch
    rows = sum(q * case.nheads + k * case.nheads_k for q, k in lengths)
    return flops, rows * (case.headdim + dim_v) * case.dtype.itemsize
