"""The KL, top-1 agreement and perplexity of a report are those of the models that load."""

import math

import pytest
import torch
from torch.nn import functional as F

import genai_perf as gp
from genai_perf.compression import GPTQ, RTN, Hadamard, Recipe
from genai_perf.compression.report import Report

IDS = torch.randint(1, 96, (20, 16), generator=torch.Generator().manual_seed(0))
UNSEEN = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(1))


def logits(path):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(UNSEEN).logits.float()


@pytest.mark.parametrize("recipe", [
    Recipe((RTN("int4", group_size=32),)), Recipe((Hadamard(), GPTQ(group_size=32))),
    Recipe.named("sparsegpt-2:4"),
], ids=lambda recipe: recipe.name)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_quality_is_that_of_the_loaded_models(saved, tmp_path, recipe, family):
    src, dst = saved(family), tmp_path / "out"
    report = gp.compress(src, dst, recipe, calibration=IDS, heldout=UNSEEN)
    p, q = logits(src).log_softmax(-1), logits(dst).log_softmax(-1)
    found = report.quality
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl > 1e-4 and found["kl"] == pytest.approx(kl, rel=0.02)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    for key, one in (("perplexity", q), ("perplexity_before", p)):
        nll = F.nll_loss(one[:, :-1].flatten(0, 1), UNSEEN[:, 1:].flatten())
        assert found[key] == pytest.approx(math.exp(nll), rel=0.01)
    assert found["tokens"] == UNSEEN.numel() and len(found["sha256"]) == 64
    assert Report.read(dst) == report and len(report.recipe_hash) == 64
    assert f"on {UNSEEN.numel()} held-out tokens: KL" in str(report)


def test_an_encoder_has_no_perplexity(saved, tmp_path):
    report = gp.compress(saved("bert"), tmp_path / "out", "int8-rtn", heldout=UNSEEN)
    assert report.quality["perplexity"] is None and report.quality["kl"] >= 0
    assert gp.compress(saved("bert"), tmp_path / "b", "int8-rtn").quality is None


def test_a_dense_copy_agrees_with_itself(saved, tmp_path):
    recipe = Recipe((RTN("int8"),), skip=("re:.*",))
    found = gp.compress(saved("llama"), tmp_path / "out", recipe, heldout=UNSEEN).quality
    assert found["kl"] == 0 and found["top1"] == 1
    assert found["perplexity"] == found["perplexity_before"]
