"""Checkpoints for serving on Neuron: their numbers, their files, and the flows of the packages."""

import json
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genai_perf import neuron
from genai_perf.neuron import export


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {"a.weight": torch.randn(24, 40), "a.bias": torch.randn(24),
            "head.weight": torch.randn(8, 40)}  # fmt: skip


@pytest.mark.parametrize("per_channel, shape", ((True, (24, 1)), (False, (1,))))
@pytest.mark.parametrize("dtype, step", (("int8", 1 / 127), ("f8e4m3", 16 / 240)))
def test_nxdi(state, dtype, step, per_channel, shape):
    packed = neuron.nxdi_state_dict(state, ["a"], dtype, per_channel=per_channel)
    codes, scale = packed["a.weight"], packed["a.scale"]
    assert scale.shape == shape and scale.dtype == torch.float32
    error = (codes.float() * scale - state["a.weight"]).abs()
    assert error.max() <= step / 2 * state["a.weight"].abs().max() * 1.01
    assert torch.equal(packed["head.weight"], state["head.weight"])


def test_fp8_bits_are_those_of_the_chip(state):
    codes, _ = neuron.quantize_static(state["a.weight"] * 1e4, "f8e4m3")
    assert codes.float().abs().max() == 240
    read = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3).astype(np.float32)
    assert (read == codes.float().numpy()).all()


def test_modelopt(state):
    packed = neuron.modelopt_state_dict(state, {"a": 12.0})
    assert packed["a.weight"].dtype == torch.float8_e4m3fn and packed["a.weight_scale"].shape == ()
    assert packed["a.input_scale"].item() == pytest.approx(12 / 240) and "a.scale" not in packed
    config = neuron.modelopt_config(["head"])
    assert config["quant_method"] == "modelopt" and config["quant_algo"] == "FP8"
    with pytest.raises(ValueError, match="absmax of a must be positive"):
        neuron.modelopt_state_dict(state, {"a": 0.0})


def test_files(state, tmp_path):
    packed = neuron.nxdi_state_dict(state, ["a"], "int8")
    folder = export.write(tmp_path / "out", packed, skipped=["head"])
    back = load_file(folder / "model.safetensors")
    assert back.keys() == packed.keys() and torch.equal(back["a.weight"], packed["a.weight"])
    names = json.loads((folder / "modules_to_not_convert.json").read_text())
    assert names == {"model": {"modules_to_not_convert": ["head"]}}
    config = neuron.nxdi_config("int8", ["head"], str(folder))
    assert config["quantization_type"] == "per_channel_symmetric"


def test_bad_input(state):
    with pytest.raises(ValueError, match="names of layers with a weight, got 'b'"):
        neuron.nxdi_state_dict(state, ["b"], "int8")
    with pytest.raises(ValueError, match="weight must be finite"):
        neuron.quantize_static(torch.tensor([[float("nan")]]), "int8")


def test_sentences_where_packages_are_missing():
    with pytest.raises(ImportError, match="optimum-neuron is not installed"):
        neuron.export_optimum("m", "out", batch_size=1, sequence_length=128)
    with pytest.raises(ImportError, match="support ended with Neuron SDK 2.26"):
        neuron.llama_for_sampling("m")


def install(monkeypatch, name: str, **contents):
    for part in [".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1)]:
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    vars(sys.modules[name]).update(contents)
    monkeypatch.setattr(export, "_installed", lambda asked: asked == name)


def test_optimum_flow(monkeypatch, tmp_path):
    calls = []

    class NeuronModelForCausalLM:  # the signatures of optimum-neuron 0.4
        @classmethod
        def get_neuron_config(cls, model_name_or_path, config=None, token=None, revision="main",
                              instance_type=None, batch_size=None, sequence_length=None,
                              tensor_parallel_size=None, prefill_chunk_size=None):  # fmt: skip
            calls.append(("config", batch_size, sequence_length, tensor_parallel_size))
            return "config"

        @classmethod
        def export(cls, model_id, neuron_config, config=None, token=None, revision="main",
                   load_weights=False):  # fmt: skip
            calls.append(("export", model_id, neuron_config, load_weights))
            return cls()

        def save_pretrained(self, directory):
            calls.append(("save", directory))

        @classmethod
        def from_pretrained(cls, model_dir):
            calls.append(("load", model_dir))
            return "model"

    install(monkeypatch, "optimum.neuron", NeuronModelForCausalLM=NeuronModelForCausalLM)
    got = neuron.export_optimum("m", tmp_path, batch_size=4, sequence_length=2048,
                                tensor_parallel_size=8)  # fmt: skip
    assert got == "model"
    assert calls == [("config", 4, 2048, 8), ("export", "m", "config", False),
                     ("save", str(tmp_path)), ("load", str(tmp_path))]  # fmt: skip


def test_transformers_neuronx_flow(monkeypatch):
    class LlamaForSampling:
        moved = False

        @classmethod
        def from_pretrained(cls, path, *, n_positions=2048, batch_size=1, amp="f32", tp_degree=2,
                            context_length_estimate=None, neuron_config=None):  # fmt: skip
            assert (path, n_positions, batch_size, amp, tp_degree) == ("m", 4096, 2, "f16", 8)
            return cls()

        def to_neuron(self):
            self.moved = True

    install(monkeypatch, "transformers_neuronx", LlamaForSampling=LlamaForSampling)
    model = neuron.llama_for_sampling("m", n_positions=4096, batch_size=2, amp="f16", tp_degree=8)
    assert model.moved
