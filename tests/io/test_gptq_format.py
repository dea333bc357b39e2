"""GPTQ tensors against a reader written from the layout's definition, word by word."""

import json

import pytest
import torch

from genai_perf import CheckpointError, formats
from genai_perf.io import Checkpoint, ShardWriter, gptq
from genai_perf.io.dialects import quantized_layers


def make(shape=(24, 64), group_size=32, dtype=torch.float16, **options):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    return formats.get("int4").quantize(weight, group_size=group_size, scale_dtype=dtype, **options)


def by_definition(tensors, name, bits=4, plus=1):
    """w[n, k] = scales[g_idx[k], n] * (code - zero), one element at a time."""
    parts = ("qweight", "qzeros", "scales", "g_idx")
    words, zeros, scales, order = (tensors[f"{name}.{part}"].tolist() for part in parts)
    per, mask = 32 // bits, 2**bits - 1
    n = len(words[0])
    weight = torch.empty(n, len(words) * per, dtype=torch.float64)
    for k in range(weight.shape[1]):
        group = order[k]
        for row in range(n):
            code = (words[k // per][row] >> (bits * (k % per))) & mask
            zero = ((zeros[group][row // per] >> (bits * (row % per))) & mask) + plus
            weight[row, k] = scales[group][row] * (code - zero)
    return weight


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_by_definition(group_size, dtype):
    qt = make(group_size=group_size, dtype=dtype)
    tensors = gptq.encode("p", qt)
    assert torch.equal(by_definition(tensors, "p"), qt.dequantize(torch.float32).double())
    assert {t.dtype for t in tensors.values()} == {torch.int32, torch.float16}
    assert {z & 0xFFFFFFFF for z in tensors["p.qzeros"].flatten().tolist()} == {0x77777777}
    back = gptq.decode("p", tensors, bits=4, group_size=group_size)
    assert torch.equal(back.qdata, qt.qdata) and torch.equal(back.scale.float(), qt.scale.float())
    assert back.group_size == group_size and back.zero_point is None


def test_int8_by_definition():
    torch.manual_seed(0)
    q = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    scale = (torch.rand(8, 1) + 0.5).half().float()  # numbers that fp16 has
    qt = formats.QuantizedTensor("int8", q.shape, torch.float32, q, scale)
    tensors = gptq.encode("p", qt)
    assert torch.equal(by_definition(tensors, "p", bits=8), qt.dequantize().double())
    assert {z & 0xFFFFFFFF for z in tensors["p.qzeros"].flatten().tolist()} == {0x7F7F7F7F}
    back = gptq.decode("p", tensors, bits=8, group_size=-1)
    assert torch.equal(back.qdata, q) and torch.equal(back.scale, scale)


@pytest.mark.parametrize("version, plus", [(1, 1), (2, 0)])
def test_reads_asymmetric_zeros_of_both_versions(version, plus):
    tensors = gptq.encode("p", make())
    generator = torch.Generator().manual_seed(1)
    nibbles = torch.randint(0, 15, (2, 24), generator=generator)
    words = (nibbles.view(2, 3, 8) << (4 * torch.arange(8))).sum(-1)
    tensors["p.qzeros"] = words.to(torch.int32)
    qt = gptq.decode("p", tensors, bits=4, group_size=32, version=version)
    assert qt.zero_point is not None
    expected = by_definition(tensors, "p", plus=plus)
    assert torch.equal(qt.dequantize(torch.float32).double(), expected)


def test_writes_asymmetric_zeros_in_version_2():
    qt = make(symmetric=False)
    tensors = gptq.encode("p", qt, version=2)
    assert torch.equal(by_definition(tensors, "p", plus=0), qt.dequantize(torch.float32).double())
    back = gptq.decode("p", tensors, bits=4, group_size=32, version=2)
    assert torch.equal(back.zero_point, qt.zero_point)


def test_scales_that_only_bf16_has():
    qt = make(dtype=torch.bfloat16)
    qt.scale = qt.scale * 2.0**40
    tensors = gptq.encode("p", qt)
    assert tensors["p.scales"].dtype == torch.bfloat16
    assert torch.equal(tensors["p.scales"].T, qt.scale)


def test_a_folder(tmp_path):
    qt = make()
    config = gptq.quantization_config(bits=4, group_size=32, skip=["l.0.gate"])
    with ShardWriter(tmp_path / "out") as writer:
        writer.write(gptq.encode("l.0.up", qt) | {"l.0.gate.weight": torch.ones(2, 2)})
        writer.commit({"quantization_config": config})
    checkpoint = Checkpoint(tmp_path / "out")
    layers = quantized_layers(checkpoint)
    assert list(layers) == ["l.0.up"]
    assert torch.equal(layers["l.0.up"].read(checkpoint).dequantize(), qt.dequantize())
    assert json.loads(json.dumps(config))["dynamic"] == {r"-:^l\.0\.gate$": {}}


def test_refused_to_write():
    for qt, words in (
        (make(symmetric=False), "asymmetric int4"),
        (formats.get("nf4").quantize(torch.randn(8, 64)), "got nf4"),
        (make((20, 64)), "a multiple of 8 rows"),
        (make((24, 72)), "divides its 72 columns"),
        (formats.get("int4").quantize(torch.randn(8, 32), group_size=32), "fp16 or bf16"),
        (formats.get("int8").quantize(torch.randn(8, 32)), "fp16 or bf16"),
    ):
        with pytest.raises(CheckpointError, match=f"layer.q: .*{words}"):
            gptq.encode("layer.q", qt)


def test_refused_to_read(tmp_path):
    good = gptq.encode("p", make())
    for change, words in (
        ({"p.qweight": torch.zeros(8, 24)}, r"p.qweight: must be torch.int32 \[8, 24\]"),
        ({"p.scales": torch.zeros(3, 24).half()}, "p.scales"),
        ({"p.qzeros": torch.zeros(2, 4, dtype=torch.int32)}, "p.qzeros"),
        ({"p.qzeros": torch.full((2, 3), -1, dtype=torch.int32)}, "p.qzeros: zero points"),
        ({"p.g_idx": torch.arange(64, dtype=torch.int32) % 2}, "p.g_idx: .*desc_act"),
    ):
        with pytest.raises(CheckpointError, match=words):
            gptq.decode("p", good | change, bits=4, group_size=32)
    for config in ({"bits": 3}, {"checkpoint_format": "marlin"}, {"group_size": None}):
        with ShardWriter(tmp_path / "out") as writer:
            base = gptq.quantization_config(bits=4, group_size=32)
            writer.write(good)
            writer.commit({"quantization_config": base | config})
        with pytest.raises(CheckpointError, match="config.json: gptq of .* not supported"):
            quantized_layers(Checkpoint(tmp_path / "out"))
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        (tmp_path / "out").rmdir()
