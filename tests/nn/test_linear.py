"""QuantLinear and quantize_model: states, moves, gradients, what is skipped and why."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import genai_perf as gp
from genai_perf import formats
from genai_perf.nn import QuantConfig, QuantLinear, quantize_model

CONFIGS = [
    "nf4",
    QuantConfig("nf4", double_quant=True),
    "int4",
    QuantConfig("int4", group_size=32, symmetric=False, scale_dtype=torch.bfloat16),
    "int8",
    "fp8",
    QuantConfig("fp8_e5m2", granularity="block"),
]


class Tiny(nn.Module):
    """Embedding, two blocks and a head, as a language model has them."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64, bias=False)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(64, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer["down"](layer["up"](h).relu())
        return self.lm_head(h)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_computes_with_the_dequantized_weight(config):
    torch.manual_seed(0)
    linear = nn.Linear(64, 43)
    layer = QuantLinear.from_float(linear, config)
    dense = nn.Linear(64, 43)
    dense.load_state_dict({"weight": layer.weight.tensor().dequantize(), "bias": linear.bias})
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    assert layer.bias is linear.bias


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_state_survives_safetensors(config, tiny, tmp_path):
    model = quantize_model(tiny, config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert {"layers.0.up.weight.qdata", "layers.0.up.weight.meta", "layers.0.up.bias"} <= set(state)
    torch.manual_seed(1)
    other = quantize_model(Tiny(), config)
    ids = torch.arange(11)[None]
    assert not torch.equal(model(ids), other(ids))
    other.load_state_dict(state)
    assert torch.equal(model(ids), other(ids))
    # A layer takes whatever format the state holds.
    foreign = quantize_model(Tiny(), "int8" if config != "int8" else "nf4")
    foreign.load_state_dict(state)
    assert torch.equal(model(ids), foreign(ids))


def test_state_loads_onto_meta_by_assignment(tiny):
    model = quantize_model(tiny, "nf4")
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = torch.arange(11)[None]
    assert torch.equal(empty(ids), model(ids))


def test_wrong_states_are_refused(tiny):
    model = quantize_model(tiny, "nf4")
    state = model.state_dict()
    broken = {k: v for k, v in state.items() if k != "layers.0.up.weight.qdata"}
    with pytest.raises(RuntimeError, match="Missing key.*layers.0.up.weight.qdata"):
        model.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="layers.0.up.weight.scale must be .*got .*95"):
        model.load_state_dict(state | {"layers.0.up.weight.scale": torch.ones(95)})
    with pytest.raises(RuntimeError, match="Unexpected key.*layers.0.up.weight.extra"):
        model.load_state_dict(state | {"layers.0.up.weight.extra": torch.ones(1)})
    swapped = {k.replace(".up.", ".x.").replace(".down.", ".up.").replace(".x.", ".down."): v
               for k, v in state.items() if not k.endswith("bias")}  # fmt: skip
    with pytest.raises(RuntimeError, match=r"must be of shape \(96, 64\), got \(64, 96\)"):
        model.load_state_dict(swapped, strict=False)
    ids = torch.arange(11)[None]
    assert torch.isfinite(model(ids)).all()


def test_copies_do_not_share(tiny):
    model = quantize_model(tiny, "int8")
    copied = copy.deepcopy(model)
    ids = torch.arange(11)[None]
    want = model(ids)
    copied.layers[0]["up"].weight.qdata.zero_()
    assert torch.equal(model(ids), want) and not torch.equal(copied(ids), want)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_cast_leaves_codes_and_scales(config, tiny):
    model = quantize_model(tiny, config)
    before = {k: v.clone() for k, v in model.state_dict().items() if ".weight." in k}
    half = model.to(torch.bfloat16)
    after = half.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if not name.endswith("meta"):
            assert torch.equal(after[name].double(), tensor.double())
    layer = half.layers[0]["up"]
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
    assert half(torch.arange(11)[None]).dtype == torch.bfloat16
    reloaded = formats.QuantizedTensor.from_state_dict(after, "layers.0.up.weight.")
    assert reloaded.dtype == torch.bfloat16


def test_gradients_reach_what_stands_below_and_the_bias(tiny):
    model = quantize_model(tiny, "nf4")
    model(torch.arange(11)[None]).square().sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0
    assert model.layers[0]["up"].bias.grad.abs().sum() > 0
    assert all("weight." not in name for name, _ in model.layers.named_parameters())


@pytest.mark.parametrize("config", ["nf4", QuantConfig("int4", symmetric=False), "fp8"], ids=str)
def test_compiles_without_a_graph_break(config, tiny):
    model = quantize_model(tiny, config)
    ids = torch.arange(11)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)
    compiled(ids).sum().backward()


def test_record_names_every_layer(tiny):
    model = quantize_model(tiny, "nf4", skip=("lm_head", "layers.1.down"))
    record = model.quantization_record
    assert record.quantized == {f"layers.{i}": "nf4" for i in ("0.up", "0.down", "1.up")}
    assert record.skipped == {"lm_head": "asked for by skip='lm_head'",
                              "layers.1.down": "asked for by skip='layers.1.down'"}  # fmt: skip
    assert isinstance(model.layers[1]["down"], nn.Linear)
    assert "skipped 2" in str(record) and "lm_head: asked" in str(record)
    assert not model.layers[0]["up"].weight.training or model.training
    text = repr(model.layers[0]["up"])
    assert "nf4" in text and "in_features=64" in text and "bytes" in text


def test_nothing_is_skipped_in_silence():
    model = Tiny(tied=True)
    model.attention = nn.MultiheadAttention(64, 2)
    model.experts = Experts()
    with pytest.warns(UserWarning, match="quantize_model leaves dense") as caught:
        quantize_model(model, "int8", skip=())
    skipped = model.quantization_record.skipped
    assert set(skipped) == {"lm_head", "attention.out_proj", "experts.gate_up"}
    assert "shared: embed.weight, lm_head.weight" in skipped["lm_head"]
    assert "(4, 64, 32)" in skipped["experts.gate_up"]
    assert all(name in str(caught[0].message) for name in skipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(Tiny(), "int8")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 64, 32))


def test_a_layer_used_twice_stays_one_layer(tiny):
    tiny.layers[1] = tiny.layers[0]
    ids = torch.arange(11)[None]
    model = quantize_model(tiny, "int8")
    assert model.layers[0]["up"] is model.layers[1]["up"]
    assert isinstance(model.layers[1]["up"], QuantLinear)
    assert model(ids).shape == (1, 11, 11)


def test_a_lone_linear_and_training_mode():
    layer = quantize_model(nn.Linear(64, 8).eval(), "nf4")
    assert isinstance(layer, QuantLinear) and not layer.training and not layer.weight.training
    assert layer.quantization_record.quantized == {"": "nf4"}


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(96, 64))
    x = torch.randn(3, 64)
    want, bound = model(x), x.abs().sum(1, keepdim=True) * model[0].weight.abs().max() / 254
    quantize_model(model, "int8")
    assert isinstance(model[0], QuantLinear)
    assert (model[0].in_features, model[0].out_features) == (64, 96)
    assert ((model[0](x) - want).abs() <= bound).all()  # half a step for each weight


def test_bad_input_is_named(tiny):
    with pytest.raises(ValueError, match="format must be one of .*got 'nf5'"):
        quantize_model(tiny, "nf5")
    with pytest.raises(ValueError, match="symmetric must be left out with format 'nf4'"):
        QuantConfig("nf4", symmetric=False)
    with pytest.raises(ValueError, match="skip entry 'layer.0' matches no layer"):
        quantize_model(tiny, "nf4", skip=("layer.0",))
    with pytest.raises(ValueError, match="nothing to quantize in Embedding"):
        quantize_model(nn.Embedding(3, 4), "nf4")
    with pytest.raises(ValueError, match="linear must be an nn.Linear or a Conv1D, got Embedding"):
        QuantLinear.from_float(nn.Embedding(3, 4), "nf4")
    q = formats.get("nf4").quantize(torch.randn(8, 64))
    with pytest.raises(
        ValueError, match=r"qweight must be of shape \(64, 8\), got shape \(8, 64\)"
    ):
        QuantLinear(8, 64, q)
    with pytest.raises(ValueError, match=r"bias must be of shape \(8,\), got shape \(9,\)"):
        QuantLinear(64, 8, q, torch.zeros(9))


def test_a_failure_leaves_the_model_as_it_was(tiny):
    with torch.no_grad():
        tiny.layers[1]["down"].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.down: .*x must be finite, got nan at \(3, 5\)"):
        quantize_model(tiny, "nf4")
    assert isinstance(tiny.layers[0]["up"], nn.Linear)


def test_fp8_keeps_nan_where_it_is_asked_to(tiny):
    with torch.no_grad():
        tiny.layers[1]["down"].weight[3, 5] = float("nan")
        tiny.layers[0]["up"].weight[2, 1] = float("inf")
    quantize_model(tiny, QuantConfig("fp8", allow_nonfinite=True))
    assert tiny.layers[1]["down"].weight.tensor().dequantize().isnan().nonzero().tolist() == [
        [3, 5]
    ]
    assert torch.isfinite(tiny.layers[0]["up"].weight.tensor().dequantize()).all()
    with pytest.raises(ValueError, match="allow_nonfinite must be left out with format 'int8'"):
        QuantConfig("int8", allow_nonfinite=True)


def test_public_names():
    assert gp.QuantLinear is QuantLinear and gp.quantize_model is quantize_model
