"""AWQ tensors against compressed-tensors' own reader of AutoAWQ, and through folders and models."""

import pytest
import torch

import genai_perf as gp
from genai_perf import CheckpointError, formats
from genai_perf.io import awq, gptq
from genai_perf.io import compressed_tensors as ct
from genai_perf.models import tiny_python_lm

library = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")


def make(symmetric=False, shape=(48, 128), group_size=32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) + 0.3
    return formats.get("int4").quantize(weight.half(), group_size=group_size, symmetric=symmetric,
                                        scale_dtype=torch.float16)  # fmt: skip


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_library_reads_our_codes(symmetric, group_size):
    qt = make(symmetric, group_size=group_size)
    tensors = awq.encode("p", qt)
    converter = library.AutoAWQConverter(group_size=group_size, targets=["re:.*"])
    read = converter.process(dict(tensors))
    want = ct.encode("p", qt)
    for part in ("weight_packed", "weight_scale"):
        assert torch.equal(read[f"p.{part}"], want[f"p.{part}"]), part
    if not symmetric:
        assert torch.equal(read["p.weight_zero_point"], want["p.weight_zero_point"])
    back = awq.decode("p", tensors, group_size=group_size)
    assert (back.zero_point is None) == symmetric
    assert torch.equal(back.dequantize(), qt.dequantize())
    assert all(torch.equal(getattr(back, k), t) for k, t in qt.components().items())


def test_golden_word():
    """Outputs 0 to 7 with codes 0 to 7: the nibbles from the lowest are 0 2 4 6 1 3 5 7."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 8)
    qt = formats.QuantizedTensor("int4", torch.Size((8, 8)), torch.float16,
                                 formats.int4.pack(codes.contiguous()),
                                 torch.ones(8, 1, dtype=torch.float16), group_size=-1)  # fmt: skip
    words = awq.encode("p", qt)["p.qweight"]
    assert words.shape == (8, 1) and {w & 0xFFFFFFFF for w in words[:, 0].tolist()} == {0x75316420}


@pytest.mark.parametrize("to", ["awq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_folder_goes_there_and_back_and_runs(to, symmetric, tmp_path):
    from genai_perf.integrations.transformers import GenaiPerfConfig, load_compressed

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = GenaiPerfConfig("int4", group_size=32, symmetric=symmetric)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_python_lm(), dtype=torch.float16, quantization_config=config)  # fmt: skip
    model.save_pretrained(tmp_path / "ct")
    gp.io.convert(tmp_path / "ct", tmp_path / to, to)
    gp.io.convert(tmp_path / to, tmp_path / "back", "compressed-tensors")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want = load_compressed(tmp_path / "ct")(input_ids=ids).logits
        for folder in (to, "back"):
            found = load_compressed(tmp_path / folder)
            assert sum(isinstance(m, gp.QuantLinear) for m in found.modules()) == 28
            assert torch.equal(found(input_ids=ids).logits, want)


def test_refused():
    with pytest.raises(CheckpointError, match="a.b: awq holds int4 weights, got int8"):
        awq.encode("a.b", formats.get("int8").quantize(torch.randn(8, 64)))
    with pytest.raises(CheckpointError, match="multiple of 8 rows .* got 9 x 64"):
        awq.encode("a.b", make(shape=(9, 64)))
    with pytest.raises(CheckpointError, match="a.b: gptq holds symmetric .* asymmetric int4"):
        gptq.encode("a.b", make())
    good = awq.encode("p", make())
    for part, value in (("qzeros", torch.zeros(3, 6, dtype=torch.int32)),
                        ("scales", torch.zeros(4, 47)), ("qweight", torch.zeros(128))):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"p.{part}: must be"):
            awq.decode("p", good | {f"p.{part}": value}, group_size=32)
