"""Dropout and the block mask of attention; their oracle cases are in test_attention.py."""

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.attention import dropout

# Known answers for Philox4x32-10, as its authors publish them: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    got = dropout.philox([torch.tensor([c]) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in got] == words


def probabilities(state, *, batch=2, heads=3, queries=9, keys=70, p=0.25, backend="native"):
    """The dropped softmax itself: every query sees every key alike, and v is the identity."""
    q = torch.zeros(batch, queries, heads, 4)
    k = torch.zeros(batch, keys, heads, 4)
    v = torch.eye(keys)[None, :, None].expand(batch, -1, heads, -1)
    return gp.attention(q, k, v, dropout_p=p, rng_state=state, backend=backend) * keys


def test_every_backend_drops_the_same():
    state = torch.tensor([2**62 + 12345, 7])
    a, b = (probabilities(state, backend=name) for name in ("native", "reference"))
    assert torch.equal(a == 0, b == 0)
    torch.testing.assert_close(a, b)
    assert set(a.flatten().mul(3).round().unique().tolist()) == {0, 4}  # 0 or 1 / (1 - 0.25)


def test_mask_depends_on_each_coordinate_alone():
    state = torch.tensor([11, 0])
    mask = probabilities(state) == 0  # (batch, queries, heads, keys)
    longer = probabilities(state, queries=12, keys=90) == 0
    assert torch.equal(longer[:, :9, :, :70], mask)
    assert torch.equal(probabilities(state, batch=1) == 0, mask[:1])
    for other in (torch.tensor([12, 0]), torch.tensor([11, 1]), torch.tensor([11, 2**32])):
        assert not torch.equal(probabilities(other) == 0, mask)
    for x, y in ((mask[0], mask[1]), (mask[:, 0], mask[:, 1]), (mask[:, :, 0], mask[:, :, 1])):
        assert 0.3 < (x == y).float().mean() < 0.9  # 0.625 where they are independent


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_the_share_that_is_dropped(p):
    kept = probabilities(torch.tensor([5, 6]), p=p, queries=64, keys=500) != 0
    n = kept.numel()
    assert abs((~kept).sum() - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


def test_state_comes_from_the_generator_of_torch():
    def draw():
        return probabilities(None)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    again = draw()
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_backward_uses_the_mask_of_the_forward():
    torch.manual_seed(3)
    v = torch.randn(1, 40, 1, 8, requires_grad=True)
    q = k = torch.zeros(1, 40, 1, 8)
    out = gp.attention(q, k, v, dropout_p=0.5)
    (dv,) = torch.autograd.grad(out.sum(), v)  # column sums of the dropped probabilities
    torch.testing.assert_close((dv[0, :, 0] * v[0, :, 0]).sum(), out.sum())


@pytest.mark.parametrize("size", [(16, 32), (64, 64), (128, 128), (50, 300)])
@pytest.mark.parametrize("causal", [False, True])
def test_block_mask_is_the_dense_mask(size, causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 290, 2, 16, generator=generator).requires_grad_() for _ in range(3))
    counts = [-(-290 // n) for n in size]
    blocks = torch.rand(2, 1, *counts, generator=generator) > 0.5
    blocks[0, 0, 0] = False  # a whole row of blocks sees nothing
    dense = blocks.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., :290, :290]
    results = []
    for mask in ({"block_mask": blocks, "block_size": size}, {"attn_bias": dense}):
        out, lse = gp.attention(q, k, v, causal=causal, **mask, return_lse=True)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        results.append((out, lse, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (results[0][0][0, : size[0]] == 0).all()


GOOD = {"q": torch.zeros(2, 5, 2, 8), "k": torch.zeros(2, 7, 1, 8), "v": torch.zeros(2, 7, 1, 8)}
BAD = [
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, "dropout_p must be in"),
    ({"dropout_p": 0.1, "rng_state": torch.zeros(2)}, "rng_state must be one of torch.int64"),
    ({"dropout_p": 0.1, "rng_state": torch.tensor([1])}, r"rng_state must be \(2,\): seed and"),
    ({"block_mask": torch.ones(2, 3, dtype=torch.bool)}, r"block_mask must be broadcastable"),
    ({"block_mask": torch.ones(1, 1)}, "block_mask must be one of torch.bool"),
    ({"block_mask": torch.ones(1, 1, dtype=torch.bool), "block_size": (0, 4)},
     r"block_size must be a pair \(queries, keys\) of ints >= 1, got \(0, 4\)"),
    ({"block_size": 128}, "block_size must be a pair"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=range(len(BAD)))
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        gp.attention(**GOOD | change)


def test_no_block_mask_with_packed_sequences():
    x, cu = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="block_mask must be None with cu_seqlens"):
        gp.attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu,
                     block_mask=torch.ones(1, 1, dtype=torch.bool))  # fmt: skip
