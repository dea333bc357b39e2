"""transformers and bitsandbytes load what we write, and compute with the dequantized values."""

import json

import bitsandbytes as bnb
import pytest
import torch
from quantized_folders import CASES, dense_twin, write

from genai_perf.io import Checkpoint

COMPRESSED = [case for case in CASES if CASES[case][0] == "ct" and "asymmetric" not in case]
NF4 = [case for case in CASES if CASES[case][0] == "bnb"]
IDS = torch.arange(1, 25).reshape(2, 12)


def load(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("case, family", [*((c, "llama") for c in COMPRESSED), ("mixed", "opt")])
def test_transformers_computes_with_our_values(saved, tmp_path, case, family):
    layers = write(case, saved(family), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(dense_twin(saved(family), layers)))


@pytest.mark.parametrize("dtype, case", [
    (torch.bfloat16, "int4"), (torch.float16, "int4"), (torch.bfloat16, "int8"),
    (torch.float16, "fp8"),
])  # fmt: skip
def test_half_precision_models(saved, tmp_path, case, dtype):
    """int4 scales are stored in the model's dtype and the values are exact; transformers rounds
    the fp32 scales of int8 and fp8 to the model's dtype when it loads them."""
    source = saved("llama-tied", dtype)
    layers = write(case, source, tmp_path / "dst")
    ours, theirs = logits(dense_twin(source, layers)), logits(load(tmp_path / "dst"))
    if case == "int4":
        assert torch.equal(ours, theirs)
    else:
        assert (ours - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * ours.abs().max()


@pytest.mark.parametrize("case, family", [(NF4[0], "llama"), (NF4[1], "gpt2")])
def test_bitsandbytes_holds_our_values(saved, tmp_path, case, family):
    layers = write(case, saved(family), tmp_path / "dst")
    model = load(tmp_path / "dst")
    found = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert found.keys() == layers.keys()
    for name, module in found.items():
        values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(values, layers[name].dequantize()), name
    ours = logits(dense_twin(saved(family), layers))
    # With AVX512-BF16 its kernel multiplies in bf16.
    assert (logits(model) - ours).abs().max() <= 2 * 2**-8 * ours.abs().max()


def test_folder_is_whole(saved, tmp_path):
    write("int4", saved("llama-tied"), tmp_path / "dst", max_shard_size="30KB")
    checkpoint = Checkpoint(tmp_path / "dst")
    assert len(list((tmp_path / "dst").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "dst" / "generation_config.json").exists()
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["ignore"] == ["lm_head"] and "sparsity_config" not in quantization
    assert "lm_head.weight" not in checkpoint.names()  # tied, stored once
    assert checkpoint.nbytes < 0.6 * Checkpoint(saved("llama-tied")).nbytes
