"""SparseGPT on layers of real trained models against the oracle of the paper."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch

from genai_perf import models
from genai_perf.compression import sparsegpt
from genai_perf.compression.capture import inputs_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDERS = {"embedded": models.tiny_python_lm(), "stories260K": DATA / "stories260K"}
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
ROWS = 96  # of each weight: the rest would not tell more
# What refinement may leave of the error of the published algorithm, mean over layers: those of
# LAYERS, and all of stories260K, where least squares on the published mask leave 0.87 for 2:4.
BOUNDS = {"0.5": 0.75, "2:4": 0.8, "4:8": 0.8, "0.7": 0.75}
# LAYERS of stories260K alone, which are harder than its mean.
HARDER = {"0.5": 0.8, "2:4": 0.86, "4:8": 0.86, "0.7": 0.8}


def texts(name):
    if name == "embedded":
        return [text[:2000] for _, text in models.stdlib_text("calibration")][:40]
    return json.loads((DATA / "ascii_calib.json").read_text())[:40]


@cache
def calibrated(name, number):
    """Layer -> (weight, Hessian) on 40 texts: LAYERS of one block, ROWS of each; None: all of the
    linears of all blocks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = FOLDERS[name]
    if not folder.exists():
        pytest.skip("shared/data/stories260K is not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = lm.model.layers if number is None else lm.model.layers[number]
    linears = {n: m for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    if number is not None:
        linears = {layer: linears[layer] for layer in LAYERS}
    with torch.no_grad(), inputs_of(linears) as hessians:
        for text in texts(name):
            lm(torch.tensor([tokenizer(text, verbose=False).input_ids[:256]]))
    rows = None if number is None else ROWS
    return {n: (linears[n].weight.detach()[:rows], h.matrix()) for n, h in hessians.items()}


@pytest.fixture(scope="module", params=FOLDERS)
def model(request):
    """(model's name, layer -> (weight, Hessian)) of block 2."""
    return request.param, calibrated(request.param, 2)


def arguments(setting):
    return {"pattern": setting} if ":" in setting else {"sparsity": float(setting)}


def for_oracle(setting):
    return (
        {"pattern": tuple(map(int, setting.split(":")))} if ":" in setting else arguments(setting)
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("setting", ["0.5", "2:4", "4:8", "0.7"])
def test_follows_the_paper(model, name, setting):
    weight, hessian = model[1][name]
    want, kept = oracles.sparsegpt(weight, hessian, **for_oracle(setting))
    options = {"refine": None} | arguments(setting)
    exact = sparsegpt.solve(weight.double(), hessian.double(), **options)
    assert np.array_equal(exact.mask.numpy(), kept)
    # A score within fp32 rounding of the threshold may fall on its other side, no more.
    plain = sparsegpt.solve(weight, hessian, **options)
    assert (plain.mask.numpy() != kept).mean() <= 1e-3
    assert plain.error / oracles.error(weight, want, hessian) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("setting", ["0.5", "2:4", "4:8", "0.7"])
def test_refinement_beats_the_paper(model, setting):
    ratios = []
    for weight, hessian in model[1].values():
        plain = sparsegpt.solve(weight, hessian, refine=None, **arguments(setting))
        refined = sparsegpt.solve(weight, hessian, **arguments(setting))
        ratios.append(refined.error / plain.error)
        assert refined.mask.sum() == plain.mask.sum()
        assert ratios[-1] < 0.95
        damped, _ = oracles.damped(hessian, 0.01)
        best = oracles.least_squares(weight[:8], damped, refined.mask[:8].numpy())
        least = oracles.error(weight[:8], best, damped)
        assert oracles.error(weight[:8], refined.weight[:8], damped) <= 1.002 * least
    bounds = BOUNDS if model[0] == "embedded" else HARDER
    assert sum(ratios) / len(ratios) <= bounds[setting]


@pytest.mark.parametrize("setting", BOUNDS)
def test_refinement_over_all_of_stories260K(setting):
    ratios = []
    for weight, hessian in calibrated("stories260K", None).values():
        plain = sparsegpt.solve(weight, hessian, refine=None, **arguments(setting))
        ratios.append(sparsegpt.solve(weight, hessian, **arguments(setting)).error / plain.error)
    assert len(ratios) == 35
    assert sum(ratios) / len(ratios) <= BOUNDS[setting]
