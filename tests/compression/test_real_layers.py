"""SparseGPT on layers of a real trained model against the oracle of the paper."""

import json
from pathlib import Path

import oracles
import pytest
import torch

from genai_perf.compression import sparsegpt
from genai_perf.compression.capture import inputs_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (DATA / "stories260K").exists(), reason="shared/data/stories260K is not here"
)
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def layers():
    """name -> (weight, Hessian) of block 2 on 40 stories."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260K")
    model = AutoModelForCausalLM.from_pretrained(DATA / "stories260K").eval()
    block = model.model.layers[2]
    linears = {name: block.get_submodule(name) for name in LAYERS}
    with torch.no_grad(), inputs_of(linears) as hessians:
        for text in json.loads((DATA / "ascii_calib.json").read_text())[:40]:
            model(torch.tensor([tokenizer(text).input_ids[:256]]))
    return {n: (linears[n].weight.detach(), h.matrix()) for n, h in hessians.items()}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("setting", ["0.5", "2:4", "4:8", "0.7"])
def test_follows_the_paper_and_refinement_beats_it(layers, name, setting):
    weight, hessian = layers[name]
    if ":" in setting:
        arguments, pattern = {"pattern": setting}, tuple(map(int, setting.split(":")))
        want, kept = oracles.sparsegpt(weight, hessian, pattern=pattern)
    else:
        arguments = {"sparsity": float(setting)}
        want, kept = oracles.sparsegpt(weight, hessian, **arguments)
    plain = sparsegpt.solve(weight, hessian, **arguments)
    assert (plain.mask.numpy() != kept).mean() <= 5e-4
    assert plain.error / oracles.error(weight, want, hessian) == pytest.approx(1, abs=2e-3)
    refined = sparsegpt.solve(weight, hessian, refine="cg", **arguments)
    damped, _ = oracles.damped(hessian, 0.01)
    best = oracles.least_squares(weight, damped, plain.mask.numpy())
    least = oracles.error(weight, best, damped)
    assert oracles.error(weight, refined.weight, damped) <= 1.001 * least
    assert refined.error < 0.95 * plain.error
