"""flash-attn's functions over its test file's shapes, against what its documentation says."""

import inspect
import itertools
import random
import zlib
from dataclasses import dataclass

import pytest
import torch

import genai_perf as gp
from genai_perf.flash_attn.bert_padding import pad_input, unpad_input
from genai_perf.testing.numerics import assert_close_to_oracle, max_error, rounding

AXES = {
    "d": (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256),
    "seqlens": ((1, 1), (1, 239), (3, 799), (113, 203), (128, 217), (113, 211), (108, 256),
                (127, 512), (256, 512), (512, 256), (239, 1), (97, 97), (200, 200), (384, 384),
                (1023, 1024)),
    "kind": ("mha", "mqa", "gqa"),
    "causal": (False, True),
    "local": (False, True),
    "softcap": (0.0, 50.0),
    "alibi": (False, True),
    "layout": ("separate", "kvpacked", "qkvpacked"),
    "varlen": (False, True),
    "dropout": (0.0, 0.17),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
}  # fmt: skip
LARGE = ((1024, 1023), (1024, 1024), (2048, 2048))  # of the sweep alone
SAMPLE = 28
FEW = 64


@dataclass(frozen=True)
class Case:
    d: int
    seqlens: tuple[int, int]
    kind: str
    causal: bool
    local: bool
    softcap: float
    alibi: bool
    layout: str
    varlen: bool
    dropout: float
    dtype: torch.dtype

    def __str__(self):
        flags = ("causal", "local", "softcap", "alibi", "varlen", "dropout")
        flags = [flag for flag in flags if getattr(self, flag)]
        sizes = (f"d{self.d}", "x".join(map(str, self.seqlens)), self.kind, self.layout)
        return "-".join((*sizes, *flags, str(self.dtype)[6:]))

    def possible(self) -> bool:
        """Self-attention in one tensor has one length and one number of heads."""
        same = self.seqlens[0] == self.seqlens[1] and self.kind == "mha"
        return self.layout != "qkvpacked" or same


def sample() -> list[Case]:
    """Every value of every axis several times, in chance company."""
    chance = random.Random(0)
    columns = {
        name: [v for _ in range(-(-4 * SAMPLE // len(values)))
               for v in chance.sample(values, len(values))]
        for name, values in AXES.items()
    }  # fmt: skip
    cases = [Case(*row) for row in zip(*columns.values(), strict=False)]
    return [case for case in cases if case.possible()][:SAMPLE]


def sweep(n: int, seed: int) -> list[Case]:
    """`n` different cases of the whole product, in chance order, or (n = 0) all of it."""
    axes = {**AXES, "seqlens": AXES["seqlens"] + LARGE}.values()
    if n == 0:
        return [c for row in itertools.product(*axes) if (c := Case(*row)).possible()]
    chance, cases = random.Random(seed), {}
    while len(cases) < n:
        case = Case(*map(chance.choice, axes))
        if case.possible():
            cases[case] = None
    return list(cases)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        n = option("--flash-sweep")
        cases = sample() if n is None else sweep(n, option("--flash-seed"))
        metafunc.parametrize("case", cases, ids=str)


def expected(q, k, v, case, window, slopes, lengths, kept):
    """out and lse as flash-attn documents them, dense, in the dtype of q.

    lengths: (batch, 2); kept: bool (batch, nheads, seqlen_q, seqlen_k), None without dropout."""
    heads, heads_k = q.shape[2], k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // heads_k, 1) for x in (k, v))
    s = q @ k.mT / case.d**0.5
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    n_q, n_k = lengths[:, 0, None, None, None], lengths[:, 1, None, None, None]
    i = torch.arange(q.shape[2])[:, None] + n_k - n_q
    j = torch.arange(k.shape[2])
    if slopes is not None:
        s = s - slopes[:, :, None, None].to(s.dtype) * (i - j).abs()
    left, right = window
    seen = (j < n_k) & (i < n_k)
    if left >= 0:
        seen = seen & (j >= i - left)
    if case.causal or right >= 0:
        seen = seen & (j <= i + (0 if case.causal else right))
    s = s.masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1, keepdim=True).expand(*s.shape[:-1], 1)
    p = s.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    lse = s.masked_fill(blind, 0).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    if kept is not None:
        p = p * kept / (1 - case.dropout)
    return (p @ v).transpose(1, 2), lse


def call(case, q, k, v, lengths, window, slopes):
    """(out, lse, S_dmask) of the function that the case is about, padded back after varlen."""
    options = dict(
        dropout_p=case.dropout, causal=case.causal, window_size=window, softcap=case.softcap,
        alibi_slopes=slopes, return_attn_probs=True,
    )  # fmt: skip
    batch, seqlen_q = q.shape[:2]
    if not case.varlen:
        if case.layout == "qkvpacked":
            out, lse, dmask = gp.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **options)
        elif case.layout == "kvpacked":
            out, lse, dmask = gp.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **options)
        else:
            out, lse, dmask = gp.flash_attn_func(q, k, v, **options)
        return out, lse, dmask
    valid_q, valid_k = (
        torch.arange(x.shape[1]) < lengths[:, i, None] for i, x in enumerate((q, k))
    )
    q, indices, cu_q, longest_q, _ = unpad_input(q, valid_q)
    k, _, cu_k, longest_k, used = unpad_input(k, valid_k)
    v = unpad_input(v, valid_k)[0]
    assert used.tolist() == lengths[:, 1].tolist() == cu_k.diff().tolist()
    if case.layout == "qkvpacked":
        packed = torch.stack((q, k, v), 1)
        out, lse, dmask = gp.flash_attn_varlen_qkvpacked_func(packed, cu_q, longest_q, **options)
    elif case.layout == "kvpacked":
        out, lse, dmask = gp.flash_attn_varlen_kvpacked_func(
            q, torch.stack((k, v), 1), cu_q, cu_k, longest_q, longest_k, **options
        )
    else:
        out, lse, dmask = gp.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, longest_q, longest_k, **options
        )
    assert lse.shape == (q.shape[1], q.shape[0])
    padded = pad_input(lse.T, indices, batch, seqlen_q)
    return pad_input(out, indices, batch, seqlen_q), padded.transpose(1, 2), dmask


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slopes: torch.Tensor | None
    window: tuple[int, int]
    lengths: torch.Tensor  # (batch, 2)


def draw(case, generator) -> Inputs:
    batch, heads, (seqlen_q, seqlen_k) = 2, 6, case.seqlens
    heads_k = {"mha": heads, "mqa": 1, "gqa": 2}[case.kind]

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(case.dtype)

    q = normal(batch, seqlen_q, heads, case.d) * (case.softcap / 10 or 1)
    k, v = (normal(batch, seqlen_k, heads_k, case.d) for _ in "kv")
    slopes = torch.rand(batch, heads, generator=generator) * 0.3 if case.alibi else None
    window = (-1, -1)
    if case.local:
        window = tuple(torch.randint(0, seqlen_k, (2,), generator=generator).tolist())
    lengths = torch.tensor([case.seqlens] * batch)
    if case.varlen:  # the first sequence is whole, the second shorter, sometimes empty
        cut = torch.rand(2, generator=generator)
        lengths[1] = (lengths[1] * (cut[0] if case.layout == "qkvpacked" else cut)).long()
    return Inputs(q, k, v, slopes, window, lengths)


def other_lse(case, x: Inputs, generator) -> float:
    """The error of lse as documented, in the dtype of the case, for other q, k and v."""

    def lse(dtype):
        leaves = (t.to(dtype) for t in (y.q, y.k, y.v))
        return expected(*leaves, case, x.window, x.slopes, x.lengths, None)[1]

    y = draw(case, generator)
    return max_error(lse(case.dtype), lse(torch.float64))


def test_shapes_of_flash_attn(case):
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    x = draw(case, generator)
    q, k, v, slopes, window, lengths = x.q, x.k, x.v, x.slopes, x.window, x.lengths
    seqlen_q, seqlen_k = case.seqlens
    valid = torch.arange(seqlen_q) < lengths[:, 0, None]
    dout = torch.randn(q.shape, generator=generator).to(case.dtype) * valid[:, :, None, None]

    def run(dtype, function):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse, *rest = function(*leaves)
        dmasks.extend(rest)
        grads = torch.autograd.grad(out, leaves, dout.to(dtype), allow_unused=True)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))

    def documented(*leaves):
        return expected(*leaves, case, window, slopes, lengths, kept)

    dmasks = []
    torch.manual_seed(0)
    got = run(case.dtype, lambda *leaves: call(case, *leaves, lengths, window, slopes))
    kept = (dmasks[0] >= 0) if case.dropout else None
    assert case.dropout or dmasks[0].numel() == 0
    ref, yardstick = run(torch.float64, documented), run(case.dtype, documented)
    assert got["lse"].dtype == torch.float32 and got["out"].dtype == case.dtype
    rows = valid[:, None].expand_as(ref["lse"])
    for result in (got, ref, yardstick):  # lse of a row that is not there says nothing
        result["lse"] = result["lse"][rows]
    for name in ("out", "lse", "dq", "dk", "dv"):
        factor = 2 if name in ("out", "lse") else 3
        nothing = name in ("dq", "dk") and ref[name].abs().max() < 1e-12
        if nothing or (seqlen_k == 1 and name in ("dq", "dk")):
            # Exactly 0, the softmax of one key (all that a window may leave) being constant. With
            # dropout a kernel takes the mean of the gradient from out, and so sees the rounding of
            # out: by the dtype's.
            seen = torch.finfo(case.dtype).eps * (dout * ref["out"]).abs().sum(-1).max()
            other = k.abs().max() if name == "dq" else q.abs().max() * q.numel() / q.shape[-1]
            allowed = 1e-4 + (seen * other if case.dropout else 0)
            assert nothing and got[name].abs().max() < allowed, name
            continue
        if name == "lse" and ref[name].isfinite().sum() < FEW:
            # The largest error among a few rows is mostly luck: the yardstick is that of other
            # draws too, as many of them as are needed.
            worst = max_error(yardstick[name], ref[name])
            error, more = max_error(got[name], ref[name]), rounding(ref[name], torch.float32)
            for _ in range(100):
                if error <= factor * worst + more:
                    break
                worst = max(worst, other_lse(case, x, generator))
            yardstick[name] = ref[name] + worst
        assert_close_to_oracle(got[name], ref[name], yardstick[name], factor, name)


SIGNATURES = {
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    options = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
               "softcap": 0.0, "alibi_slopes": None, "deterministic": False,
               "return_attn_probs": False}  # fmt: skip
    if name == "flash_attn_varlen_func":
        options["block_table"] = None
    parameters = inspect.signature(getattr(gp, name)).parameters.values()
    wanted = [(p, inspect.Parameter.empty) for p in SIGNATURES[name].split()]
    assert [(p.name, p.default) for p in parameters] == [*wanted, *options.items()]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_lse_has_a_gradient_and_a_tensor_may_be_the_window():
    q, k, v = torch.randn(3, 2, 9, 4, 16).unbind()
    q.requires_grad_()
    out, lse, _ = gp.flash_attn_func(
        q, k, v, 0.0, 0.1, False, torch.tensor([2, 0]), return_attn_probs=True
    )
    other, other_lse = gp.attention(q, k, v, softmax_scale=0.1, window_size=(2, 0), return_lse=True)
    assert torch.equal(out, other) and torch.equal(lse, other_lse)
    (grad,) = torch.autograd.grad(lse.sum(), q)
    (want,) = torch.autograd.grad(other_lse.sum(), q)
    assert grad.abs().max() > 0 and torch.equal(grad, want)


def test_pages_are_the_same_keys():
    lengths_q, lengths_k, size = [3, 0, 5], [9, 2, 5], 4
    q = torch.randn(8, 4, 16)
    pages = [torch.randn(7, size, 2, 16) for _ in "kv"]
    table = torch.tensor([[6, 0, 2], [3, 5, 5], [1, 4, 5]], dtype=torch.int32)
    whole = [
        torch.cat([p[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(lengths_k)])
        for p in pages
    ]
    cu = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    ]
    want = gp.flash_attn_varlen_func(q, *whole, *cu, 5, 9, causal=True)
    assert torch.equal(
        gp.flash_attn_varlen_func(q, *pages, *cu, 5, 9, causal=True, block_table=table), want
    )
    table[0, 1] = 7
    with pytest.raises(ValueError, match="block_table must be pages from 0 to 6, got 1 to 7"):
        gp.flash_attn_varlen_func(q, *pages, *cu, 5, 9, block_table=table)
    with pytest.raises(ValueError, match="block_table must be .* got 2 for one of 9 keys"):
        gp.flash_attn_varlen_func(q, *pages, *cu, 5, 9, block_table=table[:, :2])


@pytest.mark.parametrize("varlen", [False, True])
def test_dropout_and_its_mask(varlen):
    """out is the kept part of the softmax, scaled, times v; the same under the same seed."""
    q, k, v = torch.randn(3, 2, 37, 4, 16).unbind()
    if varlen:
        cu = torch.tensor([0, 37, 60], dtype=torch.int32)
        q, k, v = (x.flatten(0, 1)[:60] for x in (q, k, v))

        def call(**options):
            return gp.flash_attn_varlen_func(q, k, v, cu, cu, 37, 37, 0.3, causal=True, **options)
    else:

        def call(**options):
            return gp.flash_attn_func(q, k, v, 0.3, causal=True, **options)

    torch.manual_seed(5)
    out, lse, dmask = call(return_attn_probs=True)
    torch.manual_seed(5)
    assert torch.equal(call(), out)
    assert not torch.equal(call(), out)
    assert dmask.shape == (2, 4, 37, 37) and dmask.dtype == q.dtype
    rows = slice(0, 37), slice(37, 60)
    for b in range(2):
        x, y = (t[rows[b]] for t in (q, v)) if varlen else (q[b], v[b])
        z, n = (k[rows[b]] if varlen else k[b]), len(x)
        s = (x.transpose(0, 1) @ z.permute(1, 2, 0)) / 4
        p = s.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        mask = dmask[b, :, :n, :n]
        torch.testing.assert_close(mask.abs(), p, atol=1e-6, rtol=1e-4)
        want = ((mask.clamp(min=0) / 0.7) @ y.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(out[rows[b]] if varlen else out[b], want, atol=1e-5, rtol=1e-4)
        share = (mask < 0).sum() / (p > 1e-6).sum()
        assert abs(share - 0.3) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\)"),
        (dict(window_size=(-2, 0)), "window_size must be .*-1 .unbounded. or more"),
        (dict(window_size=3), "window_size must be a pair"),
        (dict(window_size=(1.5, 0)), "window_size must be a pair"),
        (dict(softcap=-1.0), "softcap must be 0"),
        (dict(dropout_p="a"), "dropout_p must be a finite number, got 'a'"),
        (dict(softmax_scale=float("inf")), "softmax_scale must be a finite number, got inf"),
        (dict(alibi_slopes=torch.ones(3)), "alibi_slopes must be"),
    ],
)
def test_bad_options(arguments, message):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        gp.flash_attn_func(q, q, q, **arguments)


def test_bad_packing():
    q, cu = torch.randn(1, 4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kv must be \(batch, seqlen, 2, nheads, headdim\)"):
        gp.flash_attn_kvpacked_func(q, torch.randn(1, 4, 3, 2, 8))
    with pytest.raises(ValueError, match=r"qkv must be \(batch, seqlen, 3, nheads, headdim\)"):
        gp.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="cu_seqlens"):
        gp.flash_attn_varlen_func(q[0], q[0], q[0], cu.long(), cu, 4, 4)
    with pytest.raises(ValueError, match="max_seqlen_k must be an int, 0 or more, got None"):
        gp.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, None)
    with pytest.raises(TypeError, match="flash_attn_varlen_func: cu_seqlens_k must be a tensor"):
        gp.flash_attn_varlen_func(q[0], q[0], q[0], cu, None, 4, 4)
    falling = torch.tensor([0, 4, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must be non-decreasing, got 4, 2 at"):
        gp.flash_attn_varlen_func(q[0], q[0], q[0], falling, falling, 3, 3)
    pages, table = q[:, :2], torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="block_table must be .*got 1 for one of 4 keys"):
        gp.flash_attn_varlen_func(q[0], pages, pages, cu, cu, 4, 4, block_table=table)
