"""transformers' from_pretrained of checkpoints that are quantized already, run compressed."""

import json

import pytest
import torch

import genai_perf as gp
from genai_perf.models import tiny_python_lm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from genai_perf.integrations.transformers import GenaiPerfConfig, read_compressed  # noqa: E402

IDS = torch.arange(40).view(2, 20) * 7
LOAD = transformers.AutoModelForCausalLM.from_pretrained
# dialect -> the format and options of a checkpoint, and what it is converted to.
CASES = {
    "awq": ("int4", {"group_size": 32, "symmetric": False}, "awq"),
    "awq-symmetric": ("int4", {"group_size": 32}, "awq"),
    "gptq": ("int4", {"group_size": 32}, "gptq"),
    "gptq-v2": ("int4", {"group_size": 32, "symmetric": False}, "gptq_v2"),
    "gptq-int8": ("int8", {}, "gptq"),
    "compressed-tensors": ("int4", {"group_size": 32, "symmetric": False}, "compressed-tensors"),
    "compressed-tensors-fp8": ("fp8", {}, "compressed-tensors"),
    "bitsandbytes": ("nf4", {"double_quant": True}, "bitsandbytes"),
    "bitsandbytes-int8": ("int8", {}, "bitsandbytes"),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def write(case, folder):
    form, options, dialect = CASES[case]
    config = GenaiPerfConfig(form, **options)
    model = LOAD(tiny_python_lm(), dtype=torch.float16, quantization_config=config)
    model.save_pretrained(folder / "first")
    gp.io.convert(folder / "first", folder / "stored", dialect)
    return folder / "stored"


@pytest.mark.parametrize("case", CASES)
def test_runs_from_the_bytes_and_is_saved_as_it_was(case, tmp_path, capfd):
    folder = write(case, tmp_path)
    with read_compressed():
        model = LOAD(folder)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, gp.QuantLinear)}
    assert len(layers) == 28 and model.dtype == torch.float16
    assert {layer.weight.format for layer in layers.values()} == {CASES[case][0]}
    want = logits(gp.load_compressed(folder))
    assert torch.equal(logits(model), want)
    said = capfd.readouterr()
    assert "UNEXPECTED" not in said.out + said.err and "MISSING" not in said.out + said.err

    model.save_pretrained(tmp_path / "again")
    first, second = (json.loads((path / "config.json").read_text())["quantization_config"]
                     for path in (folder, tmp_path / "again"))  # fmt: skip
    if not case.startswith("compressed"):  # which lists its dense layers anew
        assert second == first
    stored, again = (gp.io.Checkpoint(path) for path in (folder, tmp_path / "again"))
    assert set(stored.names()) == set(again.names())
    for name in stored.names():
        assert torch.equal(
            stored.tensor(name).view(-1).view(torch.uint8),
            again.tensor(name).view(-1).view(torch.uint8),
        ), name
    assert torch.equal(logits(gp.load_compressed(tmp_path / "again")), want)
    back = model.dequantize()
    assert not any(isinstance(m, gp.QuantLinear) for m in back.modules())


def test_experts(saved, tmp_path):
    config = GenaiPerfConfig("int4", group_size=32)
    LOAD(saved("mixtral"), quantization_config=config).save_pretrained(tmp_path / "ct")
    ids = IDS % 96
    with read_compressed(("compressed-tensors",)):
        model = LOAD(tmp_path / "ct").eval()
    assert sum(isinstance(m, gp.nn.QuantizedStack) for m in model.modules()) == 6
    with torch.no_grad():
        want = gp.load_compressed(tmp_path / "ct")(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, want)


def test_nothing_lasts_and_nothing_else_is_taken(tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

    before = dict(known)
    with read_compressed(("awq",)):
        assert {n for n in known if known[n] is not before.get(n)} == {"awq"}
        plain = LOAD(tiny_python_lm())
        assert not any(isinstance(m, gp.QuantLinear) for m in plain.modules())
    assert known == before
    with pytest.raises(ValueError, match="methods must be one of 'awq', 'gptq', .* got 'hqq'"):
        read_compressed(("hqq",)).__enter__()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = write("awq", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (folder / "config.json").write_text(json.dumps(config))
    with read_compressed(), pytest.raises(gp.CheckpointError, match="version 'gemv' is not"):
        LOAD(folder)
