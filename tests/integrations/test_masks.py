"""A mask kept as a rule gives what its matrix of bools gives; what cannot be honoured raises."""

from types import SimpleNamespace

import pytest
import torch
from transformers import masking_utils as hf

from genai_perf.integrations import attention
from genai_perf.integrations.attention import attend
from genai_perf.integrations.masks import RuleMask, mask, recognise

WINDOWS = {
    "causal": hf.causal_mask_function,
    "window": hf.sliding_window_causal_mask_function(4),
    "bidirectional": hf.bidirectional_mask_function,
    "both sides": hf.sliding_window_bidirectional_mask_function(3),
}
LENGTHS = {  # q_length, kv_length, q_offset, kv_offset
    "prompt": (9, 9, 0, 0),
    "second part": (4, 9, 5, 0),
    "static cache": (6, 16, 0, 0),
    "static cache, second part": (4, 16, 6, 0),
    "sliding cache": (4, 7, 11, 8),
    "token": (1, 9, 8, 0),
    "static token": (1, 16, 8, 0),
}
MODULE = SimpleNamespace(is_causal=True)


def padding(kind: str | None, length: int) -> torch.Tensor | None:
    if kind is None:
        return None
    kept = torch.ones(3, length, dtype=torch.bool)
    if kind == "left":
        kept[1, :3], kept[2, :1] = False, False
    elif kind == "right":
        kept[1, -3:], kept[2, -1:] = False, False
    elif kind == "holes":
        kept[1, 2:4], kept[2, ::3] = False, False
    elif kind == "empty":
        kept[1] = False
    return kept


def states(q_length: int, kv_length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, q_length), (2, kv_length), (2, kv_length))
    return [torch.randn(3, h, s, 8, generator=generator, dtype=torch.float64) for h, s in sizes]


def run(q, k, v, attention_mask, **options):
    out = attend(MODULE, q, k, v, attention_mask, **options)[0]
    return out if attention_mask is None else out.detach()


@pytest.mark.parametrize("pad", [None, "left", "right", "holes", "empty"])
@pytest.mark.parametrize("lengths", ["token", "static token"])
@pytest.mark.parametrize("window", ["causal", "window"])
def test_a_token_decoded(window, lengths, pad, monkeypatch):
    called, plain = [], attention.decode_attention
    monkeypatch.setattr(
        attention, "decode_attention", lambda *a, **k: called.append(k) or plain(*a, **k)
    )
    test_rule_is_its_matrix(window, lengths, pad)
    assert bool(called) == (pad in (None, "left"))


@pytest.mark.parametrize("pad", [None, "left", "right", "holes", "empty"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_rule_is_its_matrix(window, lengths, pad):
    q_length, kv_length, q_offset, kv_offset = LENGTHS[lengths]
    rows = torch.arange(q_length) + q_offset
    arguments = dict(batch_size=3, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                     kv_offset=kv_offset, mask_function=WINDOWS[window],
                     attention_mask=padding(pad, q_offset + q_length))  # fmt: skip
    made = mask(**arguments)
    dense = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
    if made is None:
        assert dense[..., : q_offset + q_length].tril(q_offset - kv_offset).equal(dense)
    else:
        assert made.shape == dense.shape and torch.equal(made & True, dense)
    q, k, v = states(q_length, kv_length)
    got, want = run(q, k, v, made), run(q, k, v, dense)
    whole = q_length == kv_length
    if pad is not None and (whole or window in ("causal", "window")):
        # rows of padding count for nothing
        counted = arguments["attention_mask"][:, rows]
        got, want = got[counted], want[counted]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_bias_and_rule_together():
    q, k, v = states(9, 9)
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    for pad in (None, "left"):
        arguments = dict(batch_size=3, q_length=9, kv_length=9, mask_function=WINDOWS["window"],
                         attention_mask=padding(pad, 9))  # fmt: skip
        made, dense = mask(**arguments), hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert isinstance(made, RuleMask)
        outs = [attend(MODULE, q, k, v, m, position_bias=bias)[0] for m in (made, dense)]
        torch.testing.assert_close(*outs, atol=1e-12, rtol=0)
        grads = [torch.autograd.grad(out.square().sum(), bias)[0] for out in outs]
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)
        assert grads[0].abs().max() > 0


def test_a_mask_of_someone_elses_making_is_a_matrix():
    def even(batch, head, query, key):
        return (key <= query) & (key % 2 == 0)

    made = mask(2, 5, 5, mask_function=hf.or_masks(hf.causal_mask_function, even))
    assert not isinstance(made, RuleMask) and made.shape == (2, 1, 5, 5)
    assert recognise(even) is None
    assert recognise(hf.chunked_causal_mask_function(4, torch.zeros(1))) is None
    assert recognise(hf.and_masks(hf.causal_mask_function, even)) is None


def test_a_rule_stays_one_where_a_matrix_was_asked_for():
    made = mask(1, 5, 5, allow_is_causal_skip=False)
    assert isinstance(made, RuleMask) and mask(1, 5, 5) is None
    assert torch.equal(torch.cat([made, made], -1), torch.ones(5, 5).tril().bool().tile(1, 1, 1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dropout=1.0), "dropout_p must be in"),
        (dict(output_attentions=True), "output_attentions must be False"),
        (dict(cache=object()), "cache must be None"),
        (dict(cu_seq_lens_q=torch.tensor([0, 27])), "given together"),
    ],
)
def test_refused(arguments, message):
    q, k, v = states(9, 9)
    with pytest.raises(ValueError, match=message):
        attend(MODULE, q, k, v, None, **arguments)


def test_refused_masks():
    q, k, v = states(9, 9)
    with pytest.raises(ValueError, match="attention_mask must be 4-D, or None"):
        attend(MODULE, q, k, v, torch.ones(3, 9))
    cut = torch.tensor([0, 27], dtype=torch.int32)
    padded = mask(3, 9, 9, attention_mask=padding("left", 9))
    for refused in (padded, padded.dense):
        with pytest.raises(ValueError, match="attention_mask must be None beside cu_seq_lens_q"):
            attend(MODULE, q, k, v, refused, cu_seq_lens_q=cut, cu_seq_lens_k=cut)


def test_what_only_the_models_own_attention_knows_is_refused(monkeypatch):
    import sys

    class Layer:
        is_causal = True

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, tilt=None):
        raise NotImplementedError

    monkeypatch.setattr(
        sys.modules[__name__], "eager_attention_forward", eager_attention_forward, raising=False
    )
    q, k, v = states(9, 9)
    assert attend(Layer(), q, k, v, None)[0].shape == (3, 9, 4, 8)
    with pytest.raises(ValueError, match="tilt must be None .not known how Layer uses it."):
        attend(Layer(), q, k, v, None, tilt=0.5)
    layer = Layer()
    layer._parameters = {"sinks": torch.zeros(4)}
    with pytest.raises(ValueError, match="s_aux must be the sinks of Layer"):
        attend(layer, q, k, v, None)


def test_dropout_arrives_with_and_without_a_mask():
    q, k, v = states(9, 9)
    for made in (None, mask(3, 9, 9, attention_mask=padding("left", 9))):
        torch.manual_seed(3)
        first = run(q, k, v, made, dropout=0.5)
        torch.manual_seed(3)
        assert torch.equal(run(q, k, v, made, dropout=0.5), first)
        assert not torch.equal(run(q, k, v, made, dropout=0.5), first)
        plain = run(q, k, v, made)
        mean = sum(run(q, k, v, made, dropout=0.5) for _ in range(300)) / 300
        assert (mean - plain).abs().mean() < 0.1 * plain.abs().mean()


def test_autocast_decides_the_dtype():
    q, k, v = (x.float() for x in states(9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(MODULE, q, k.bfloat16(), v.bfloat16(), None)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype"):
        attend(MODULE, q, k.bfloat16(), v.bfloat16(), None)
