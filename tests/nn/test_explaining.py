"""gp.explain of a model, and quantize_model(strict=True)."""

import pytest
import torch
from torch import nn

import genai_perf as gp
from genai_perf.nn import SparseLinear, quantize_model
from genai_perf.ops.quant_matmul import native


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 64))


def model():
    torch.manual_seed(0)
    pruned = nn.Linear(64, 64)
    with torch.no_grad():
        pruned.weight.view(64, -1, 4)[..., :2] = 0
    return nn.ModuleDict({
        "body": nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)),
        "pruned": SparseLinear.from_float(pruned),
        "experts": Experts(),
        "lm_head": nn.Linear(64, 100, bias=False),
    })  # fmt: skip


def test_each_layer_is_told():
    quantized = model()
    with pytest.warns(UserWarning, match="experts.up"):
        quantize_model(quantized, "nf4")
    told = {layer.name: layer for layer in gp.explain(quantized).layers}
    assert list(told) == ["body.0", "body.2", "pruned", "experts.up", "lm_head"]
    assert (told["body.0"].format, told["body.0"].kernel) == ("nf4", "native")
    assert told["body.0"].reason == "" and told["body.0"].nbytes < 64 * 128
    assert (told["pruned"].format, told["pruned"].kernel) == ("sparse 2:4", "native")
    assert told["experts.up"].kernel == "torch" and "not a layer" in told["experts.up"].reason
    assert told["lm_head"].reason == "asked for by skip='lm_head'"
    page = str(gp.explain(quantized))
    assert "body.2" in page
    dense = 4 * 8 * 64 + 6400
    assert f"{dense / (dense + 2 * 64 * 128 + 64 * 64):.1%} of " in page


def test_a_slow_layer_is_named_and_refused_when_strict(monkeypatch):
    slow = model()
    reason = "the native extension is not built"
    monkeypatch.setattr(native, "why_not", lambda *args: reason)
    said = "strict, and body.0 would run the slow reference: .*extension is not built"
    with pytest.raises(ValueError, match=said):
        quantize_model(slow, "nf4", strict=True)
    assert type(slow["body"][0]) is nn.Linear
    with pytest.warns(UserWarning, match="experts.up"):
        quantize_model(slow, "nf4")
    assert gp.explain(slow).layers[0].slow


def test_dynamic8_has_no_kernel():
    layer = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="native has no kernel for dynamic8 weights"):
        quantize_model(layer, "dynamic8", strict=True)


def test_a_layer_with_arguments_is_a_call():
    layer = quantize_model(nn.Linear(64, 64), "int8")
    assert gp.explain(layer, torch.zeros(2, 64)).op == "quant_matmul"
    (told,) = gp.explain(layer).layers
    assert told.format == "int8" and "(the model)" in str(gp.explain(layer))


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="ReLU holds no linear layer"):
        gp.explain(nn.ReLU())
