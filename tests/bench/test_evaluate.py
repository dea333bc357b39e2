"""Perplexity against closed forms and against transformers' own loss."""

import math

import pytest
import torch

from genai_perf.bench.evaluate import divergence, perplexity, windows


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    ids = torch.randint(0, 50, (6, 16))
    quality = perplexity(lambda x: torch.zeros(*x.shape, 50), ids, batch_size=4)
    assert quality.perplexity == pytest.approx(50)
    assert quality.tokens == 6 * 15
    assert len(quality.window_nll) == 6


def test_known_probabilities():
    """A model that gives the next token probability 1/2 or 1/8 by its parity."""

    def model(ids):
        logits = torch.full((*ids.shape, 8), -math.inf)
        for b, row in enumerate(ids.tolist()):
            for t, after in enumerate(row[1:]):
                p = 0.5 if after % 2 else 0.125
                logits[b, t] = math.log((1 - p) / 7)
                logits[b, t, after] = math.log(p)
        return logits

    quality = perplexity(model, torch.tensor([[0, 1, 2, 3, 5]]))
    assert quality.nll == pytest.approx((3 * math.log(2) + math.log(8)) / 4, rel=1e-6)


def test_agrees_with_the_loss_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (3, 20))
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    assert perplexity(model, ids, batch_size=2).nll == pytest.approx(loss, rel=1e-6)


def test_an_infinite_loss_is_not_an_error():
    quality = perplexity(lambda x: torch.full((*x.shape, 4), math.nan), torch.zeros(1, 3).long())
    assert math.isnan(quality.nll)
    assert quality.perplexity == math.inf


def test_windows_do_not_overlap_and_spread():
    ids = torch.arange(103)
    assert windows(ids, 10).shape == (10, 10)
    assert windows(ids, 10)[3, 0] == 30
    assert windows(ids, 10, limit=3)[:, 0].tolist() == [0, 40, 90]


def test_bad_windows():
    with pytest.raises(ValueError, match="at least one window of 10 tokens, got 9"):
        windows(torch.arange(9), 10)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        windows(torch.arange(9), 1)


def test_divergence_is_the_mean_kl_of_every_token():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    tables = [torch.randn(7, 7, dtype=torch.float64, generator=generator) for _ in range(2)]
    q, p = (lambda batch, t=table: t[batch] for table in tables)
    chosen = (torch.distributions.Categorical(logits=one(ids)) for one in (p, q))
    wanted = torch.distributions.kl_divergence(*chosen).mean()
    assert divergence(q, p, ids, batch_size=2) == pytest.approx(float(wanted), rel=1e-5)
    assert divergence(p, p, ids) == 0
