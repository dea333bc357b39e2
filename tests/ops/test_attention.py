"""attention against the float64 oracle and torch's own SDPA, and its contracts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_checks import check_oracle, leaves, run, same_precision
from torch import library

import genai_perf as gp
from genai_perf.ops.attention import cases
from genai_perf.testing.numerics import assert_close_to_oracle

ORACLE_CASES = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_NAME = {case.name: case for case in cases.CASES}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda c: c.name)
def test_oracle(isa, case, dtype):
    if case.dtype not in (torch.float32, dtype):
        pytest.skip("a case of another dtype")
    check_oracle(cases.make_inputs(dataclasses.replace(case, dtype=dtype)))


@pytest.mark.parametrize("rule", ["full", "causal", "bias", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_against_torch(rule, dtype):
    """torch's SDPA in float64 as an outside judge of outputs and gradients."""
    case = dataclasses.replace(BY_NAME["causal"], seqlen_q=150, seqlen_k=150, dtype=dtype)
    causal = rule == "causal"
    q, k, v = (cases.make_inputs(case)[n].requires_grad_() for n in "qkv")
    bias = torch.randn(4, 150, 150, generator=torch.Generator().manual_seed(2))
    bias = {"bias": bias.to(dtype).requires_grad_(), "mask": bias > 0}.get(rule)
    wanted = (q, k, v, bias) if rule == "bias" else (q, k, v)
    out = gp.attention(q, k, v, causal=causal, attn_bias=bias, backend="native")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grads = torch.autograd.grad(out, wanted, dout)

    def sdpa(dtype):
        x = [t.detach().to(dtype).transpose(1, 2).requires_grad_() for t in (q, k, v)]
        mask = bias.detach().to(dtype).requires_grad_() if rule == "bias" else bias
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(*x, mask, is_causal=causal, enable_gqa=True)
        x = [*x, mask] if rule == "bias" else x
        g = torch.autograd.grad(y, x, dout.transpose(1, 2).to(dtype))
        return [t.detach().transpose(1, 2) for t in (y, *g[:3])] + [t.detach() for t in g[3:]]

    for got, ref, same in zip((out, *grads), sdpa(torch.float64), sdpa(dtype), strict=True):
        assert_close_to_oracle(got, ref, same, factor=3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # that flex_attention runs uncompiled
def test_score_rules_against_flex_attention():
    """softcap, ALiBi and the window as torch's flex_attention has them (forward only on a CPU)."""
    from torch.nn.attention.flex_attention import flex_attention

    inputs = cases.make_inputs(dataclasses.replace(BY_NAME["everything"], sinks=False))
    inputs["q"] = inputs["q"] * 3
    got = run(inputs, backend="native")
    cap, slopes, (left, right) = inputs["softcap"], inputs["alibi_slopes"], inputs["window_size"]
    offset = inputs["k"].shape[1] - inputs["q"].shape[1]

    def rule(score, b, h, i, j):
        distance = j - i - offset
        score = cap * torch.tanh(score / cap) - slopes[b, h] * distance.abs()
        return torch.where((distance >= -left) & (distance <= right), score, -torch.inf)

    x = [inputs[n].double().transpose(1, 2) for n in "qkv"]
    out, lse = flex_attention(*x, score_mod=rule, enable_gqa=True, return_lse=True)
    with same_precision():
        same = run(inputs, backend="reference", upstream=got["upstream"])
    assert_close_to_oracle(got["out"], out.transpose(1, 2), same["out"])
    assert_close_to_oracle(got["lse"], lse, same["lse"], name="lse")


def test_sinks_against_transformers():
    """The attention of GPT-OSS as transformers writes it, which divides by the sink as well."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    inputs = cases.make_inputs(dataclasses.replace(BY_NAME["sinks"], seqlen_q=40, seqlen_k=40))
    call, wanted = leaves(inputs)
    out = gp.attention(**call, backend="native")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    q, k, v, sinks = (x.detach().double().requires_grad_() for x in wanted.values())
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = sinks, 4
    module.eval()
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None].double()
    theirs, _ = gpt_oss.eager_attention_forward(
        module, *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=32**-0.5
    )
    ref = torch.autograd.grad(theirs, (q, k, v, sinks), dout.double())
    for got, want in zip((out, *grads), (theirs, *ref), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


GRADCHECK = ("odd", "blind_rows", "everything", "bias", "bias_of_keys", "mask", "packed_rules",
             "dropout_bias", "blocks_uneven")  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck_of_the_reference(name):
    case = BY_NAME[name]
    small = dataclasses.replace(
        case, seqlen_q=4, seqlen_k=3, headdim=3, batch=1, nheads=2, nheads_k=1,
        window_size=(1, None), lengths=((3, 2), (0, 2), (1, 1)) if case.lengths else (),
    )  # fmt: skip
    call, wanted = leaves(cases.make_inputs(small), torch.float64)

    def f(*tensors, call=call, wanted=wanted):
        out, lse = gp.attention(**call | dict(zip(wanted, tensors, strict=True)), return_lse=True)
        return out, lse[torch.isfinite(lse)]

    assert torch.autograd.gradcheck(f, tuple(wanted.values()))
    assert torch.autograd.gradgradcheck(f, tuple(wanted.values()))


def test_second_derivative_of_the_native_backend():
    call, wanted = leaves(cases.make_inputs(BY_NAME["odd"]))
    call64, wanted64 = leaves(cases.make_inputs(BY_NAME["odd"]), torch.float64)

    def second(call, wanted, backend):
        out = gp.attention(**call, backend=backend)
        first = torch.autograd.grad(out.square().sum(), wanted["q"], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), list(wanted.values()))

    for got, ref in zip(second(call, wanted, "native"), second(call64, wanted64, "reference"),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(got.double(), ref, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_strides(dtype):
    """Packed qkv views, (b, h, s, d) storage, broadcast and reversed layouts give the same bits."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 50, 3, 4, 24, generator=g).to(dtype)
    plain = [x.contiguous() for x in qkv.unbind(2)]
    want = run(dict(zip("qkv", plain, strict=True)), backend="native")

    def same(q, k, v):
        got = run({"q": q, "k": k, "v": v}, backend="native", upstream=want["upstream"])
        for name in want.keys() - {"upstream"}:
            assert torch.equal(got[name], want[name]), name

    same(*qkv.unbind(2))
    same(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain))
    same(
        *(x.transpose(1, 3).contiguous().transpose(1, 3) for x in plain)
    )  # last dim not contiguous
    one = [x[:, :, :1] for x in plain]
    wide = [x.expand(-1, -1, 4, -1) for x in one]  # stride 0
    for a, b in zip(
        run(dict(zip("qkv", wide, strict=True)), backend="native").values(),
        run(
            dict(zip("qkv", (x.contiguous() for x in wide), strict=True)), backend="native"
        ).values(),
        strict=True,
    ):
        assert all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


def test_strided_and_broadcast_upstream():
    inputs = cases.make_inputs(BY_NAME["causal"])
    call, wanted = leaves(inputs)
    out = gp.attention(**call, backend="native")
    a = torch.autograd.grad(out.sum(), list(wanted.values()), retain_graph=True)  # stride 0
    b = torch.autograd.grad(out, list(wanted.values()), torch.ones_like(out))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("name", ["causal", "window_both", "decode"])
def test_batch_invariance_and_repeatability(isa, name):
    inputs = cases.make_inputs(dataclasses.replace(BY_NAME[name], batch=3))
    want = run(inputs, backend="native")
    for i in range(3):
        one = {n: x[i : i + 1] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        got = run(one, backend="native", upstream=[x[i : i + 1] for x in want["upstream"]])
        for key in want.keys() - {"upstream"}:
            assert torch.equal(got[key], want[key][i : i + 1]), key
    again = run(inputs, backend="native")
    assert all(torch.equal(again[key], want[key]) for key in want.keys() - {"upstream"})


@pytest.mark.parametrize("name", ["blocks", "many_strips", "bias_shared", "bias_everything"])
def test_thread_count_changes_nothing(name):
    inputs = cases.make_inputs(BY_NAME[name])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key in other.keys() - {"upstream"}:
            assert torch.equal(other[key], results[0][key]), key


def test_poison_outside_is_not_read(isa):
    """q, k, v and dout lie in NaN: before, after, and between the rows of each head."""
    case = dataclasses.replace(BY_NAME["odd"], headdim=20)
    inputs = cases.make_inputs(case)
    want = run(inputs, backend="native")

    def poisoned(x):
        nest = torch.full([n + 2 for n in x.shape], torch.nan, dtype=x.dtype)
        inner = nest[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)

    nested = {n: poisoned(x) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    upstream = [poisoned(x) for x in want["upstream"]]
    call = {n: x.requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in nested.items()}
    out, lse = gp.attention(**call, return_lse=True, backend="native")
    grads = torch.autograd.grad((out, lse), [call[n] for n in "qkv"], upstream)
    for key, got in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        assert torch.equal(got, want[key]), key


def test_nan_arrives(isa):
    inputs = cases.make_inputs(BY_NAME["blocks"])
    inputs["q"][0, 3, 0, 0] = torch.nan
    out, lse = gp.attention(**inputs, return_lse=True, backend="native")
    assert out[0, 3, 0].isnan().all() and lse[0, 0, 3].isnan()
    assert not out[0, 4].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(isa, size):
    inputs = cases.make_inputs(dataclasses.replace(BY_NAME["square"], headdim=16))
    inputs["k"] = torch.full_like(inputs["k"], size / 4)  # logits q.k / 4 up to 1e4 and beyond
    inputs["q"] = inputs["q"].abs()
    check_oracle(inputs)


def test_lse_of_few_keys(isa):
    """Its error is that of the scores, which a plain product over so few keys sums lane by lane."""
    case = cases.Case("few keys", seqlen_q=112, seqlen_k=5, nheads=7, nheads_k=1, headdim=128)
    for seed in range(4):
        check_oracle(cases.make_inputs(case, seed=seed))


def test_all_ones(isa):
    ones = torch.ones(2, 300, 2, 16)
    out, lse = gp.attention(ones, ones, ones, softmax_scale=1.0, return_lse=True, backend="native")
    torch.testing.assert_close(out, ones, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 16 + torch.tensor(300.0).log().item()))


def test_blind_rows_are_zero(isa):
    inputs = cases.make_inputs(BY_NAME["blind_rows"])  # 130 queries, 40 keys: 90 see nothing
    got = run(inputs, backend="native")
    assert (got["out"][:, :90] == 0).all() and (got["dq"][:, :90] == 0).all()
    assert (got["lse"][:, :, :90] == -torch.inf).all() and got["lse"][:, :, 90:].isfinite().all()
    assert all(got[key].isfinite().all() for key in ("out", "dq", "dk", "dv"))


def test_a_window_past_everything_is_no_window():
    inputs = cases.make_inputs(BY_NAME["square"])
    want = gp.attention(**inputs)
    assert torch.equal(gp.attention(**inputs | {"window_size": (2**62, 2**62)}), want)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_linear(threads):
    """16384 keys and queries: the score matrix alone would be 1 GiB."""
    import resource

    q = torch.randn(1, 16384, 1, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gp.attention(q, q, q, window_size=(64, 64), backend="native")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB


def test_packed_sequences_are_the_dense_ones(isa):
    inputs = cases.make_inputs(BY_NAME["packed_rules"])
    want = run(inputs, backend="native")
    cu_q, cu_k = (inputs[f"cu_seqlens_{x}"].tolist() for x in "qk")
    dsinks = 0
    for b, (i, j) in enumerate(zip(cu_q, cu_k, strict=True)):
        if b == len(cu_q) - 1:
            break
        rows, keys = slice(i, cu_q[b + 1]), slice(j, cu_k[b + 1])
        alone = {n: x for n, x in inputs.items() if not n.startswith("cu_")}
        alone["q"] = inputs["q"][None, rows]
        alone["k"], alone["v"] = inputs["k"][None, keys], inputs["v"][None, keys]
        alone["alibi_slopes"] = inputs["alibi_slopes"][b]
        dout, dlse = want["upstream"]
        got = run(alone, backend="native", upstream=[dout[None, rows], dlse[None, :, rows]])
        for name, part in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            assert torch.equal(got[name][0], want[name][part]), name
        assert torch.equal(got["lse"][0], want["lse"][:, rows])
        dsinks = dsinks + got["dsinks"]
    torch.testing.assert_close(dsinks, want["dsinks"])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_past_the_last_sequence(backend):
    """They may hold NaN, and give 0 in out and in the gradients."""
    inputs = cases.make_inputs(BY_NAME["packed"])
    want = run(inputs, backend=backend)

    def longer(x):
        return torch.cat([x, torch.full((3, *x.shape[1:]), torch.nan)])

    call, wanted = leaves(inputs | {n: longer(inputs[n]) for n in "qkv"})
    out, lse = gp.attention(**call, return_lse=True, backend=backend)
    assert (lse[:, -3:] == -torch.inf).all() and torch.equal(lse[:, :-3], want["lse"])
    dout = longer(want["upstream"][0])
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    plain, plain_wanted = leaves(inputs)
    plain_out = gp.attention(**plain, backend=backend)
    plain_grads = torch.autograd.grad(plain_out, list(plain_wanted.values()), want["upstream"][0])
    for got, ref in zip((out, *grads), (plain_out, *plain_grads), strict=True):
        assert torch.equal(got[:-3], ref) and (got[-3:] == 0).all()


def test_opcheck():
    q, k, v = (x for x in leaves(cases.make_inputs(BY_NAME["odd"]))[1].values())
    bias = torch.zeros(2, 1, 5, 7, requires_grad=True)
    masks = (None, torch.ones(2, 1, 1, 1, dtype=torch.bool), torch.tensor([3, 4]))
    rest = (0, 0, -1, 0, 0.3, 2.0, 8, 8, 0.2)
    options = (bias, torch.zeros(2), torch.ones(2), None, *masks, *rest)
    library.opcheck(torch.ops.genai_perf.attention_fwd.default, (q, k, v, *options))
    out, lse = gp.attention(q, k, v, return_lse=True)
    args = [x.detach() for x in (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse)]
    library.opcheck(torch.ops.genai_perf.attention_bwd.default, (*args, True, *options))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def loss(q, k, v):
        return gp.attention(q * 2, k, v, causal=True, window_size=(3, None)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (9, 12):
        case = dataclasses.replace(BY_NAME["odd"], seqlen_q=seqlen, seqlen_k=seqlen)
        tensors = list(leaves(cases.make_inputs(case))[1].values())
        want = torch.autograd.grad(loss(*tensors), tensors)
        got = torch.autograd.grad(compiled(*tensors), tensors)
        assert all(map(torch.equal, got, want))


def test_explain_and_backends():
    inputs = cases.make_inputs(BY_NAME["odd"])
    assert gp.explain(gp.attention, **inputs).backend == "native"
    double = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    chosen = gp.explain(gp.attention, **double)
    assert chosen.backend == "reference" and "float64" in chosen.reasons["native"]
    with pytest.raises(gp.BackendUnsupported, match="float64"):
        gp.attention(**double, backend="native")


BAD = [
    ({"q": torch.zeros(2, 5, 8)}, r"q must be \(batch, seqlen, nheads, headdim\) \(4 dim"),
    ({"q": torch.zeros(2, 5, 2, 8, dtype=torch.int32)}, "q must be one of torch.float32"),
    ({"k": torch.zeros(2, 7, 1, 8).half()}, "k must be of the dtype of q"),
    ({"k": torch.zeros(2, 7, 1, 9)}, r"headdim of k must be that of q \(8\), got 9"),
    ({"k": torch.zeros(3, 7, 1, 8), "v": torch.zeros(3, 7, 1, 8)}, "batch of k and v must be"),
    ({"v": torch.zeros(2, 6, 1, 8)}, "v must be of k's shape up to headdim"),
    ({"q": torch.zeros(2, 5, 3, 8), "k": torch.zeros(2, 7, 2, 8), "v": torch.zeros(2, 7, 2, 8)},
     r"nheads of q must be a multiple of nheads_k \(2\), got 3"),
    ({"q": torch.zeros(2, 5, 2, 0), "k": torch.zeros(2, 7, 1, 0)}, "headdim must be at least 1"),
    ({"window_size": (-2, 0)}, r"window_size must be \(left, right\)"),
    ({"window_size": 5}, "window_size must be a pair"),
    ({"softcap": -1.0}, r"softcap must be 0 \(none\) or positive and finite, got -1.0"),
    ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must be \(nheads 2,\) or \(batch"),
    ({"alibi_slopes": torch.zeros(2).half()}, "alibi_slopes must be one of torch.float32"),
    ({"alibi_slopes": torch.zeros(2, requires_grad=True)}, "alibi_slopes must be a constant"),
    ({"attn_bias": torch.zeros(2, 2, 5, 6)}, r"attn_bias must be broadcastable to .*2, 5, 7\)"),
    ({"attn_bias": torch.zeros(1, 2, 2, 5, 7)}, "attn_bias must be broadcastable"),
    ({"attn_bias": torch.zeros(5, 7).int()}, "attn_bias must be one of"),
    ({"sinks": torch.zeros(1)}, r"sinks must be \(nheads 2,\), got \(1,\)"),
    ({"k": torch.zeros(2, 7, 1, 8, device="meta")}, "k must be of the device of q"),
    ({"backend": "tpu"}, "backend must be one of"),
]  # fmt: skip


BAD_PACKED = [
    ({"cu_seqlens_k": None}, "cu_seqlens_q and cu_seqlens_k must be given together"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, "cu_seqlens_q must be one of torch.int32, got"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}, "of one length, batch"),
    ({"cu_seqlens_q": torch.tensor([0, 6], dtype=torch.int32)}, "from 0 to at most 5 .*got 0 to 6"),
    ({"cu_seqlens_q": torch.tensor([1, 5], dtype=torch.int32)}, "cu_seqlens_q must be from 0"),
    ({"cu_seqlens_q": torch.tensor([0, 4, 3], dtype=torch.int32),
      "cu_seqlens_k": torch.tensor([0, 3, 7], dtype=torch.int32)},
     "cu_seqlens_q must be non-decreasing, got 4, 3 at positions 1, 2"),
    ({"q": torch.zeros(1, 5, 2, 8)}, r"q must be \(total, nheads, headdim\)"),
    ({"attn_bias": torch.zeros(5, 7)}, "attn_bias must be None with cu_seqlens"),
    ({"max_seqlen_q": -1}, "max_seqlen_q must be an int, 0 or more, got -1"),
    ({"max_seqlen_k": 6.5}, "max_seqlen_k must be an int, 0 or more, got 6.5"),
    ({"max_seqlen_k": 6}, r"max_seqlen_k must be at least 7 \(sequence 0\), got 6"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_PACKED, ids=range(len(BAD_PACKED)))
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_packed_input(change, message, backend):
    good = {"q": torch.zeros(5, 2, 8), "k": torch.zeros(7, 1, 8), "v": torch.zeros(7, 1, 8),
            "cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        gp.attention(**good | change, backend=backend)


@pytest.mark.parametrize("change, message", BAD, ids=[m[:24] for _, m in BAD])
def test_bad_input(change, message):
    good = {
        "q": torch.zeros(2, 5, 2, 8),
        "k": torch.zeros(2, 7, 1, 8),
        "v": torch.zeros(2, 7, 1, 8),
    }
    with pytest.raises(ValueError, match=message):
        gp.attention(**good | change)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        gp.attention([1.0], torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
