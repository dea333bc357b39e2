"""Hidden-state and relation losses against whole attention maps, in chunks of any size."""

import math

import pytest
import torch
import torch.nn.functional as F

from genai_perf.distill import (
    HiddenProjections,
    hidden_state_loss,
    layer_map,
    minilm_loss,
    relation_loss,
)

pytest.importorskip("genai_perf._C", reason="the native extension is not built")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(student, teacher, causal, mask):
    """The loss through float64 maps (batch, heads, seqlen, seqlen)."""
    maps = []
    for a, b in (student, teacher):
        b = b.repeat_interleave(a.shape[2] // b.shape[2], 2)
        z = torch.einsum("bihd,bjhd->bhij", a, b) / math.sqrt(a.shape[3])
        gone = ~mask[:, None, None, :].expand_as(z)
        if causal:
            gone = gone | torch.ones(z.shape[-2:], dtype=torch.bool).triu(1)
        maps.append(z.masked_fill(gone, -math.inf).log_softmax(-1))
    s, t = maps
    each = torch.where(t == -math.inf, 0.0, t.exp() * (t - s)).sum(-1)  # (batch, heads, seqlen)
    keep = mask[:, None, :].expand_as(each)
    return each[keep].sum() / keep.sum()


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_relations_equal_whole_maps(chunk_bytes, causal, kv_heads):
    student = randn(2, 11, 4, 6), randn(2, 11, kv_heads, 6, seed=1)
    teacher = randn(2, 11, 4, 9, seed=2), randn(2, 11, kv_heads, 9, seed=3)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    exact = [x.double().requires_grad_() for x in student]
    want = whole(exact, [x.double() for x in teacher], causal, mask)
    leaves = [x.clone().requires_grad_() for x in student]
    got = relation_loss(tuple(leaves), teacher, causal=causal, mask=mask, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    for a, b in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(want, exact),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a.double(), 3 * b, rtol=1e-4, atol=1e-7)


def test_relation_heads_join_models_of_different_heads():
    student, teacher = randn(2, 7, 2, 6), randn(2, 7, 4, 8, seed=1)
    got = relation_loss((student, student), (teacher, teacher), heads=4)
    mask = torch.ones(2, 7, dtype=torch.bool)
    s, t = student.reshape(2, 7, 4, 3), teacher.reshape(2, 7, 4, 8)
    want = whole((s.double(), s.double()), (t.double(), t.double()), False, mask)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_minilm_is_the_sum_of_its_relations():
    student = {name: randn(1, 5, 2, 4, seed=i) for i, name in enumerate("qkv")}
    teacher = {name: randn(1, 5, 2, 8, seed=i + 5) for i, name in enumerate("qkv")}
    parts = [relation_loss((student[a], student[b]), (teacher[a], teacher[b]), causal=True)
             for a, b in (("q", "k"), ("v", "v"))]  # fmt: skip
    torch.testing.assert_close(minilm_loss(student, teacher, causal=True), sum(parts))
    assert minilm_loss(teacher, teacher) < 1e-6


def test_a_mask_of_nothing_gives_zero():
    q = randn(1, 4, 1, 4).requires_grad_()
    loss = relation_loss((q, q), (q * 2, q), mask=torch.zeros(1, 4))
    assert loss == 0 and not torch.autograd.grad(loss, q)[0].any()
    states = [q.detach()[:, :, 0]] * 2
    assert hidden_state_loss(states, states, mask=torch.zeros(1, 4)) == 0


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_states(kind):
    student = [randn(2, 5, 8, seed=i).requires_grad_() for i in range(3)]
    teacher = [randn(2, 5, 8, seed=i + 9) for i in range(5)]
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0
    got = hidden_state_loss(student, teacher, kind=kind, mask=mask)
    want = 0.0
    for i, j in ((0, 0), (1, 2), (2, 4)):
        s, t = student[i][mask != 0], teacher[j][mask != 0]
        if kind == "cosine":
            want += F.cosine_embedding_loss(s, t, torch.ones(len(s)))
        else:
            want += F.mse_loss(s, t)
    torch.testing.assert_close(got, want / 3)
    got.backward()
    assert all(x.grad.any() and not x.grad[0, 3:].any() for x in student)


def test_projections_between_widths():
    student, teacher = [randn(2, 5, 8)] * 3, [randn(2, 5, 12, seed=1)] * 3
    projections = HiddenProjections(3, 8, 12)
    loss = hidden_state_loss(student, teacher, projections=projections, kind="mse")
    loss.backward()
    assert all(p.grad is not None for p in projections.parameters())
    with pytest.raises(ValueError, match="projections map one width to another"):
        hidden_state_loss(student, teacher)
    with pytest.raises(ValueError, match="projections must be 1, one a pair, got 3"):
        hidden_state_loss(student, teacher, layers=[(2, 2)], projections=projections)


def test_layer_maps():
    assert layer_map(6, 12) == tuple((i, 2 * i) for i in range(7))
    assert layer_map(2, 4, "last") == ((2, 4),)
    assert layer_map(4, 3)[-1] == (4, 3)
    with pytest.raises(ValueError, match="how must be one of"):
        layer_map(2, 4, "first")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": (randn(1, 4, 3, 4), randn(1, 4, 2, 4))}, "student b must be of headdim 4"),
        ({"student": (randn(1, 4, 4), randn(1, 4, 4))}, r"\(batch, seqlen, nheads, headdim\)"),
        ({"student": (randn(1, 5, 2, 4),) * 2}, "of one batch, heads and seqlen"),
        ({"mask": torch.ones(1, 5)}, r"mask must be of shape \(1, 4\)"),
        ({"heads": 3}, "of one width that 3 heads divide"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
    ],
)
def test_bad_input(change, message):
    arguments = {"student": (randn(1, 4, 2, 4),) * 2, "teacher": (randn(1, 4, 2, 4),) * 2} | change
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(ValueError, match="relation_loss: .*" + message):
        relation_loss(student, teacher, **arguments)
    with pytest.raises(ValueError, match=r"layers\[0\] must be below"):
        hidden_state_loss([randn(1, 2, 3)], [randn(1, 2, 3)], layers=[(1, 0)])
