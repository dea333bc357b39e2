"""from_pretrained with a GenaiPerfConfig, and what save_pretrained writes."""

import copy
import json

import pytest
import torch

import genai_perf as gp
from genai_perf.models import tiny_python_lm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from genai_perf.integrations.transformers import GenaiPerfConfig, read_compressed  # noqa: E402

WAYS = [
    {"format": "nf4"},
    {"format": "nf4", "double_quant": True},
    {"format": "fp4"},
    {"format": "int8"},
    {"format": "int4", "group_size": 64},
    {"format": "fp8"},
]
IDS = torch.arange(40).view(2, 20) * 7
LOAD = transformers.AutoModelForCausalLM.from_pretrained


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(map(str, o.values())))
def test_quantized_while_loading(options, dtype, tmp_path):
    folder = tiny_python_lm()
    model = LOAD(folder, dtype=dtype, quantization_config=GenaiPerfConfig(**options))
    layers = [m for m in model.modules() if isinstance(m, gp.QuantLinear)]
    assert len(layers) == 28 == len(model.quantization_record.quantized)
    assert {m.weight.format for m in layers} == {options["format"]}
    dense = logits(LOAD(folder, dtype=dtype))
    got = logits(model)
    assert 0 < (got - dense).norm() < 0.25 * dense.norm()
    if options["format"] == "nf4" and dtype == torch.float32:
        twin = gp.quantize_model(LOAD(folder, dtype=dtype), gp.nn.QuantConfig(**options))
        assert torch.equal(logits(twin), got)

    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == (
        "bitsandbytes" if options["format"] in ("nf4", "fp4") else "compressed-tensors"
    )
    assert torch.equal(logits(gp.load_compressed(tmp_path)), got)
    plain = LOAD(tmp_path, dtype=dtype)
    assert not any(isinstance(m, gp.QuantLinear) for m in plain.modules())
    # bitsandbytes' kernel for AVX512-BF16 rounds activations to bfloat16.
    exact = dtype == torch.float32 and options["format"] not in ("nf4", "fp4")
    rounding = 1e-4 if exact else 0.03
    assert (logits(plain) - got).norm() < rounding * got.norm()


def test_searched_scales_and_thresholds(tmp_path):
    folder = tiny_python_lm()
    dense = logits(LOAD(folder))
    plain = LOAD(folder, quantization_config=GenaiPerfConfig("int3"))
    config = GenaiPerfConfig("int3", search=True)
    model = LOAD(folder, dtype=torch.bfloat16, quantization_config=config)
    assert (logits(model) - dense).norm() < 0.9 * (logits(plain) - dense).norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(gp.load_compressed(tmp_path)), logits(model))

    config = GenaiPerfConfig("int8", activations="int8", threshold=4.0)
    model = LOAD(folder, quantization_config=config)
    layers = [m for m in model.modules() if isinstance(m, gp.QuantLinear)]
    assert {(layer.activations, layer.threshold) for layer in layers} == {("int8", 4.0)}
    rounded = LOAD(folder, quantization_config=GenaiPerfConfig("int8", activations="int8"))
    assert (logits(model) - dense).norm() < (logits(rounded) - dense).norm()
    with pytest.raises(ValueError, match="threshold must be 0, or more with activations"):
        GenaiPerfConfig("nf4", threshold=4.0)


@pytest.mark.parametrize("options, strategy", [
    ({"format": "int8", "activations": "int8"}, "token"),
    ({"format": "int4", "activations": "int8", "group_size": 64}, "group"),
    ({"format": "fp8", "activations": "fp8"}, "token"),
    ({"format": "fp8", "granularity": "block", "activations": "fp8"}, "group"),
], ids=["int8", "int4", "fp8", "fp8-block"])  # fmt: skip
def test_rounded_activations_are_written(options, strategy, tmp_path):
    """compressed-tensors' linears then lose as much by it as ours (their unit of int8 is another);
    read again, the file still says so."""
    model = LOAD(tiny_python_lm(), quantization_config=GenaiPerfConfig(**options))
    model.save_pretrained(tmp_path / "ours")
    theirs = LOAD(tmp_path / "ours")
    found = theirs.config.quantization_config.quantization_config.config_groups["group_0"]
    assert found.input_activations.strategy == strategy and found.input_activations.dynamic
    with read_compressed():
        again = LOAD(tmp_path / "ours")
    plain = logits(again)  # the same weights, activations as they are
    lost, lost_by_theirs = ((logits(m) - plain).norm() for m in (model, theirs))
    assert 0.7 * lost < lost_by_theirs < 1.4 * lost
    again.save_pretrained(tmp_path / "again")
    groups = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
              ["config_groups"] for name in ("ours", "again")]  # fmt: skip
    assert groups[0] == groups[1]


def test_weights_that_are_not_finite(tmp_path, caplog):
    model = LOAD(tiny_python_lm())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # transformers' own
        LOAD(tmp_path, quantization_config=GenaiPerfConfig("fp8"))
    assert "layers.1.mlp.down_proj: weight must be finite, got nan at (3, 5)" in caplog.text
    config = GenaiPerfConfig("fp8", allow_nonfinite=True)
    layer = LOAD(tmp_path, quantization_config=config).model.layers[1].mlp.down_proj
    assert layer.weight.tensor().dequantize().isnan().nonzero().tolist() == [[3, 5]]
    with pytest.raises(ValueError, match="allow_nonfinite must be left out with format 'nf4'"):
        GenaiPerfConfig("nf4", allow_nonfinite=True)


def test_conv1d_and_generate(tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    model = LOAD(tmp_path / "dense", quantization_config=GenaiPerfConfig("int8"))
    assert len(model.quantization_record.quantized) == 8
    assert "lm_head" in model.quantization_record.skipped
    dense = logits(LOAD(tmp_path / "dense"))
    assert (logits(model) - dense).norm() < 0.02 * dense.norm()
    assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape == (2, 25)
    back = model.dequantize()
    assert not any(isinstance(m, gp.QuantLinear) for m in back.modules())
    torch.testing.assert_close(logits(back), logits(model))


def test_skipped_layers_stay_dense_and_are_named():
    config = GenaiPerfConfig("int4", skip=("lm_head", "layers.0", "down_proj"))
    model = LOAD(tiny_python_lm(), quantization_config=config)
    names = {n for n, m in model.named_modules() if isinstance(m, gp.QuantLinear)}
    assert len(names) == 18 and not any("layers.0" in n or "down_proj" in n for n in names)
    told = {layer.name: layer.reason for layer in gp.explain(model).layers}
    assert told["model.layers.0.mlp.up_proj"] == "asked for by skip='layers.0'"


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="format must be one of"):
        GenaiPerfConfig("nf5")
    with pytest.raises(ValueError, match="granularity must be left out"):
        GenaiPerfConfig("nf4", granularity="row")
    with pytest.raises(ValueError, match="skip entry 'layer.0' matches no linear layer"):
        LOAD(tiny_python_lm(), quantization_config=GenaiPerfConfig(skip=("layer.0",)))
    model = LOAD(tiny_python_lm(), quantization_config=GenaiPerfConfig("fp8_e5m2"))
    with pytest.raises(ValueError, match="genai_perf and is not serializable"):
        model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.*Llama4Router:UserWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "llama4"])
@pytest.mark.parametrize("options", [WAYS[1], {"format": "int4", "group_size": 32}, WAYS[5]],
                         ids=lambda o: "-".join(map(str, o.values())))  # fmt: skip
def test_experts_are_quantized_while_loading_and_saved(options, family, saved, tmp_path):
    ids = IDS % 96
    model = LOAD(saved(family), quantization_config=GenaiPerfConfig(**options))
    stacks = [n for n, m in model.named_modules() if isinstance(m, gp.nn.QuantizedStack)]
    assert len(stacks) == 6 and set(stacks) <= set(model.quantization_record.quantized)
    dense = copy.deepcopy(model).dequantize().eval()
    assert not any(isinstance(m, gp.nn.QuantizedStack) for m in dense.modules())
    with torch.no_grad():
        got = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(dense(input_ids=ids).logits, got, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = gp.load_compressed(tmp_path)
        assert sum(isinstance(m, gp.nn.QuantizedStack) for m in again.modules()) == 6
        torch.testing.assert_close(again(input_ids=ids).logits, got, rtol=1e-5, atol=1e-5)
    if family in ("mixtral", "qwen3-moe") and options["format"] in ("int4", "fp8"):
        # Under the names that the family has; transformers reads packed and fp8 experts alone.
        with torch.no_grad():
            plain = LOAD(tmp_path)(input_ids=ids).logits
        assert (plain - got).norm() < 1e-4 * got.norm()
