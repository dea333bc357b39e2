"""Stacked experts, quantized: logits of the dequantized model, state, record, what is refused."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import genai_perf as gp
from genai_perf.nn import QuantConfig, QuantizedStack, quantize_model
from genai_perf.nn.experts import find_stacks

pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from tiny_models import tiny_model  # noqa: E402

IDS = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(0))
FAMILIES = {"mixtral": 6, "qwen3-moe": 6, "gpt-oss": 6, "llama4": 6}
CONFIGS = ["nf4", "int8", QuantConfig("int4", group_size=32, symmetric=False),
           QuantConfig("fp8", granularity="block")]  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:.*Llama4Router:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logits_are_those_of_the_dequantized_model(family, config):
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    before = logits(model)
    quantize_model(model, config)
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedStack)}
    assert len(stacks) == FAMILIES[family]
    assert not find_stacks(model)
    with torch.no_grad():
        for name, stack in stacks.items():
            original = dense.get_parameter(name)
            assert stack.shape == original.shape
            original.copy_(stack.dequantize())
        for name, module in model.named_modules():
            if isinstance(module, gp.QuantLinear):
                dense.get_submodule(name).weight.copy_(module.weight.tensor().dequantize())
    got = logits(model)
    torch.testing.assert_close(got, logits(dense), rtol=1e-4, atol=1e-4)
    assert (got - before).norm() > 1e-3 * before.norm()
    told = {layer.name: layer for layer in gp.explain(model).layers}
    for name, stack in stacks.items():
        assert model.quantization_record.quantized[name] == stack.format
        assert told[name].format == stack.format and told[name].nbytes == stack.nbytes
        assert told[name].kernel == ("native" if gp.backends()["native"] is None else "reference")


def test_each_expert_is_quantized_by_itself():
    model = tiny_model("gpt-oss")
    stack = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    got = quantize_model(model, "nf4").model.layers[0].mlp.experts.down_proj
    for matrix, weight in zip(stack, got.weights, strict=True):
        alone = gp.quantize(matrix.T.contiguous(), "nf4")
        assert torch.equal(weight.tensor().qdata, alone.qdata)
        assert torch.equal(weight.tensor().scale, alone.scale)


def test_state_moves_copies_and_trains():
    model = quantize_model(tiny_model("mixtral"), "int4")
    want = logits(model)
    torch.manual_seed(1)
    other = tiny_model("mixtral")
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other = quantize_model(other, "int4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert model.to(torch.bfloat16)(input_ids=IDS).logits.dtype == torch.bfloat16
    embedded = other.get_input_embeddings()(IDS).detach().requires_grad_()
    other(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad.abs().sum() > 0 and torch.isfinite(embedded.grad).all()


def test_one_expert_at_a_time_also_where_the_model_runs_whole_stacks():
    model = tiny_model("mixtral")
    model.set_experts_implementation("grouped_mm")
    before = copy.deepcopy(model)
    logits_of_dense = logits(before)
    quantize_model(model, "int8", skip=("layers.0", "self_attn", "lm_head"))
    assert set(model.quantization_record.quantized) == {
        f"model.layers.{i}.mlp.experts.{p}" for i in (1, 2) for p in ("gate_up_proj", "down_proj")
    }
    got = logits(model)
    assert 0 < (got - logits_of_dense).norm() < 0.05 * logits_of_dense.norm()
    assert model.config._experts_implementation == "grouped_mm"
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "grouped_mm"


@pytest.mark.filterwarnings("ignore")  # torch and transformers warn of themselves while compiling
@pytest.mark.parametrize("family", ["llama4", "mixtral"])
def test_compiled(family):
    """In one graph where the model multiplies whole stacks, else in several around its loop."""
    model = quantize_model(tiny_model(family).eval(), "nf4")
    want = logits(model)
    torch._dynamo.reset()
    whole = family == "llama4"
    got = logits(torch.compile(model, fullgraph=whole, backend="aot_eager"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_left_dense_is_named():
    model = tiny_model("mixtral")
    quantize_model(model, "nf4", skip=("experts", "lm_head"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert model.quantization_record.skipped[name] == "asked for by skip='experts'"
    assert next(x for x in gp.explain(model).layers if x.name == name).kernel == "torch"


def test_a_stack_of_unknown_layout_is_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(2, 8, 8))

    model = nn.ModuleDict({"experts": Experts(), "up": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="leaves dense: experts.w1 .a parameter of shape"):
        quantize_model(model, "int8")
    assert set(model.quantization_record.skipped) == {"experts.w1"}


def test_bad_input():
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 5] = torch.nan
    before = {id(module) for module in model.modules()}
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: .*nan at \(0, 5\)"):
        quantize_model(model, "nf4")
    assert {id(module) for module in model.modules()} == before
    with pytest.raises(ValueError, match="weights must be one or more of one shape"):
        QuantizedStack([], transposed=False)
    x, stack = torch.randn(3, 8), QuantizedStack.from_float(torch.randn(2, 6, 8), "int8",
                                                            transposed=False)  # fmt: skip
    torch.testing.assert_close(F.linear(x, stack[1]), x @ stack.dequantize()[1].T)
    for wrong in (lambda: x @ stack[0], lambda: torch.bmm(x[None], stack),
                  lambda: torch.add(x, stack[0])):  # fmt: skip
        with pytest.raises(TypeError, match="takes part in one product"):
            wrong()
    with pytest.raises(IndexError):
        F.linear(x, stack[2])
