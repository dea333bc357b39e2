"""The compressed-tensors library reads our bytes to our own dequantized values, exactly."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig

from genai_perf import CheckpointError, formats
from genai_perf.io import compressed_tensors as ct

CASES = {
    "int4": ("int4", dict(group_size=32)),
    "int4-bf16": ("int4", dict(group_size=64, scale_dtype=torch.bfloat16)),
    "int4-fp16": ("int4", dict(group_size=32, scale_dtype=torch.float16)),
    "int4-channel": ("int4", dict(group_size=-1)),
    "int4-asymmetric": ("int4", dict(group_size=32, symmetric=False)),
    "int4-asymmetric-bf16": ("int4", dict(group_size=32, symmetric=False,
                                          scale_dtype=torch.bfloat16)),
    "int4-asymmetric-channel": ("int4", dict(group_size=-1, symmetric=False)),
    "int3": ("int3", dict(group_size=32, scale_dtype=torch.bfloat16)),
    "int3-asymmetric": ("int3", dict(group_size=32, symmetric=False)),
    "int2-channel": ("int2", dict(group_size=-1)),
    "int2-asymmetric": ("int2", dict(group_size=32, symmetric=False)),
    "int8": ("int8", {}),
    "fp8-row": ("fp8", {}),
    "fp8-tensor": ("fp8", dict(granularity="tensor")),
    "fp8-block": ("fp8", dict(granularity="block")),
}  # fmt: skip
SHAPES = [(48, 128), (17, 192), (160, 384)]


def make(case: str, shape=(48, 128), seed=0):
    name, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    weight[1] = 0  # a row that is all zero
    weight[2, :32] *= 40
    dtype = options.get("scale_dtype", torch.float32)
    return formats.get(name).quantize(weight.to(dtype), **options)


def library_reads(tensors, config, dtype):
    """The library's dequantized weight of the one layer in `tensors`, in the scale's dtype."""
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    state = {key.removeprefix("a.b."): tensor for key, tensor in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry(group.format)
    return compressor.decompress(state, group)["weight"].to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_library_reads_our_values(case, shape):
    qt = make(case, shape)
    config = ct.quantization_config({"a.b": ct.scheme(qt)}, ["lm_head"])
    read = library_reads(ct.encode("a.b", qt), config, qt.dtype)
    assert read.shape == qt.shape
    assert torch.equal(read, qt.dequantize())


def test_library_reads_packed_int8():
    qt = make("int8")
    scheme = ct.scheme(qt, int8="pack-quantized")
    config = ct.quantization_config({"a.b": scheme}, [])
    tensors = ct.encode("a.b", qt, int8="pack-quantized")
    assert config["format"] == "pack-quantized"
    assert torch.equal(library_reads(tensors, config, torch.float32), qt.dequantize())
    back = ct.decode("a.b", tensors, scheme)
    assert torch.equal(back.qdata, qt.qdata) and torch.equal(back.scale, qt.scale)


GROUPED = [case for case in CASES if case[:4] in ("int4", "int3", "int2") and "channel" not in case]


@pytest.mark.parametrize("case, shape", [
    (case, shape) for case in CASES for shape in [*SHAPES, (5, 40)]
    if shape[1] % 32 == 0 or case not in GROUPED
])  # fmt: skip
def test_decode_inverts_encode(case, shape):
    qt = make(case, shape)
    back = ct.decode("a.b", ct.encode("a.b", qt), ct.scheme(qt))
    expected = qt.components()
    assert back.components().keys() == expected.keys()
    for name, tensor in back.components().items():
        assert tensor.dtype == expected[name].dtype
        same = torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
        assert same, name
    assert (back.format, back.shape, back.dtype, back.group_size) == (
        qt.format, qt.shape, qt.dtype, qt.group_size)  # fmt: skip


@pytest.mark.parametrize("n, k", [(3, 8), (9, 40), (16, 64), (5, 36), (4, 33)])
def test_words_equal_the_librarys(n, k):
    """Also where a row is not a whole number of words."""
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    u = (codes + 8).to(torch.uint8)
    u = torch.nn.functional.pad(u, (0, k % 2))
    qt = formats.QuantizedTensor("int4", torch.Size((n, k)), torch.float32,
                                 u[:, ::2] | (u[:, 1::2] << 4), torch.ones(n, 1))  # fmt: skip
    words = ct.encode("m", qt)["m.weight_packed"]
    assert torch.equal(words, pack_to_int32(codes, 4))
    zero = torch.randint(0, 16, (n, 1), dtype=torch.uint8)
    qt.zero_point = zero
    packed = ct.encode("m", qt)["m.weight_zero_point"]
    assert torch.equal(packed, pack_to_int32((zero.to(torch.int8) - 8), 4, packed_dim=0))


def test_golden_words():
    u = torch.arange(16, dtype=torch.uint8)[None]
    qt = formats.QuantizedTensor("int4", torch.Size((1, 16)), torch.float32,
                                 u[:, ::2] | (u[:, 1::2] << 4), torch.ones(1, 1))  # fmt: skip
    words = ct.encode("m", qt)["m.weight_packed"]
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == [0x76543210, 0xFEDCBA98]
    q = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    qt = formats.QuantizedTensor("int8", torch.Size((1, 4)), torch.float32, q, torch.ones(1, 1))
    words = ct.encode("m", qt, int8="pack-quantized")["m.weight_packed"]
    assert words[0, 0].item() & 0xFFFFFFFF == 0xFF807F00


def test_int4_bytes_are_shared_not_copied():
    qt = make("int4")
    tensors = ct.encode("m", qt)
    assert tensors["m.weight_packed"].data_ptr() == qt.qdata.data_ptr()
    back = ct.decode("m", tensors, ct.scheme(qt))
    assert back.qdata.data_ptr() == qt.qdata.data_ptr()


def test_groups_find_the_scheme_of_a_layer():
    a, b = ct.scheme(make("int4")), ct.scheme(make("fp8-row"))
    one = ct.quantization_config({"l.0.q": a, "l.1.q": a}, ["lm_head"])
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    groups = ct.Groups(one, "config.json")
    assert groups.scheme("l.1.q") == a and groups.scheme("lm_head") is None
    assert groups.scheme("l.1.norm", "RMSNorm") is None
    two = ct.quantization_config({"l.0.q": a, "l.0.k": b, "l.1.q": a}, ["lm_head"])
    assert two["format"] == "mixed-precision" and "sparsity_config" not in two
    groups = ct.Groups(two, "config.json")
    assert [groups.scheme(n) for n in ("l.0.q", "l.0.k", "l.1.q", "l.1.k")] == [a, b, a, None]
    two["config_groups"]["group_0"]["targets"] = [r"re:.*\.q$"]
    two["ignore"] = ["re:l.1"]
    groups = ct.Groups(two, "config.json")
    assert groups.scheme("l.7.q") == a and groups.scheme("l.1.q") is None
    QuantizationConfig.model_validate(two)


def test_refused_to_write():
    nf4 = formats.get("nf4").quantize(torch.randn(4, 64))
    with pytest.raises(CheckpointError, match="nf4"):
        ct.encode("m", nf4)
    with pytest.raises(CheckpointError, match="fp8_e5m2"):
        ct.encode("m", formats.get("fp8_e5m2").quantize(torch.randn(4, 64)))
    with pytest.raises(CheckpointError, match="layers.3.up: .* divides the 40 columns, got 32"):
        ct.encode("layers.3.up", formats.get("int4").quantize(torch.randn(4, 40), group_size=32))


@pytest.mark.parametrize("change, words", [
    ({"num_bits": 5}, "5-bit int"),
    ({"type": "float"}, "4-bit float"),
    ({"actorder": "group"}, "activation order"),
    ({"strategy": "tensor"}, "by tensor"),
    ({"group_size": 12}, "groups of 12"),
])  # fmt: skip
def test_refused_to_read(change, words):
    config = ct.quantization_config({"m": ct.scheme(make("int4"))}, [])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(CheckpointError, match=f"config.json: config group group_0: .*{words}"):
        ct.Groups(config, "config.json")


@pytest.mark.parametrize("groups", [
    None, [], {"g": {}}, {"g": {"weights": {"num_bits": 8, "type": "int"}}},
    {"g": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}, "targets": [3]}},
    {"g": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}, "targets": ["re:("]}},
])  # fmt: skip
def test_bad_config(groups):
    config = {"format": "pack-quantized", "config_groups": groups}
    with pytest.raises(CheckpointError, match="config.json"):
        ct.Groups(config, "config.json")


@pytest.mark.parametrize("part, value", [
    ("weight_packed", torch.zeros(48, 15, dtype=torch.int32)),
    ("weight_packed", torch.zeros(48, 16, dtype=torch.int64)),
    ("weight_scale", torch.zeros(48, 3)),
    ("weight_scale", torch.zeros(48, 4, dtype=torch.int32)),
])  # fmt: skip
def test_damaged_tensors_are_named(part, value):
    qt = make("int4")
    tensors = ct.encode("l.q", qt) | {f"l.q.{part}": value}
    with pytest.raises(CheckpointError, match="l.q.weight"):
        ct.decode("l.q", tensors, ct.scheme(qt))
