"""bitsandbytes reads our nf4 and fp4 bytes to our own dequantized values, and we read its."""

import bitsandbytes as bnb
import pytest
import torch

from genai_perf import CheckpointError, formats
from genai_perf.io import bitsandbytes as dialect


def make(shape=(48, 96), double_quant=False, dtype=torch.float32, kind="nf4"):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.05
    weight.view(-1)[:64] = 0  # a block that is all zero
    return formats.get(kind).quantize(weight.to(dtype), double_quant=double_quant)


def bitsandbytes_reads(tensors, name="p"):
    """Its dequantized weight. Asked for the flat shape: with two dimensions, its CPU kernel takes
    the scales of K/64 blocks a row, and gives wrong values where 64 does not divide K (0.50.2)."""
    stats = {key.removeprefix(f"{name}."): tensor.clone() for key, tensor in tensors.items()}
    weight = stats.pop("weight")
    parameter = bnb.nn.Params4bit.from_prequantized(weight, stats, device="cpu")
    return dequantized(parameter.data, parameter.quant_state)


def dequantized(data, state):
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return bnb.functional.dequantize_4bit(data, state).view(shape)


@pytest.mark.parametrize("kind", dialect.BOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (300, 256), (7, 9)], ids=str)
def test_bitsandbytes_reads_our_values(shape, double_quant, dtype, kind):
    qt = make(shape, double_quant, dtype, kind)
    read = bitsandbytes_reads(dialect.encode("p", qt))
    assert read.dtype == dtype and torch.equal(read, qt.dequantize())


@pytest.mark.parametrize("kind", dialect.BOOKS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_we_read_what_bitsandbytes_writes(double_quant, kind):
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(96, 40, bias=False, quant_type=kind,
                               compress_statistics=double_quant)  # fmt: skip
    linear = linear.to("cpu")
    state = {f"p.{key}": value for key, value in linear.state_dict().items()}
    qt = dialect.decode("p", state, kind)
    expected = dequantized(linear.weight.data, linear.weight.quant_state)
    assert qt.shape == (40, 96) and torch.equal(qt.dequantize(), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", dialect.BOOKS)
@pytest.mark.parametrize("shape", [(48, 96), (7, 9)], ids=str)
def test_decode_inverts_encode(shape, double_quant, kind):
    qt = make(shape, double_quant, torch.bfloat16, kind)
    tensors = dialect.encode("p", qt)
    back = dialect.decode("p", tensors, kind)
    for name, tensor in qt.components().items():
        assert torch.equal(getattr(back, name), tensor), name
    assert (back.shape, back.dtype, back.group_size) == (qt.shape, qt.dtype, qt.group_size)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_in_a_wider_dtype(storage):
    """What bnb_4bit_quant_storage does for sharded training."""
    qt = make()
    tensors = dialect.encode("p", qt)
    tensors["p.weight"] = tensors["p.weight"].view(-1).view(storage)[:, None]
    assert torch.equal(dialect.decode("p", tensors).dequantize(), qt.dequantize())


def test_refused():
    with pytest.raises(CheckpointError, match="layer.q: .* got int4"):
        dialect.encode("layer.q", formats.get("int4").quantize(torch.randn(4, 64)))
    good = dialect.encode("p", make(double_quant=True))
    book = good["p.weight.quant_map"].clone()
    book[3] += 0.25
    for change, words in (
        ({f"p.{dialect.STATE}": torch.tensor([123], dtype=torch.uint8)}, "nf4 weight"),
        ({"p.weight.quant_map": book}, "quant_map: is not the code book"),
        ({"p.weight.absmax": torch.zeros(3, dtype=torch.uint8)}, "p.weight: .*scale"),
        ({"p.weight": torch.zeros(9, 1, dtype=torch.uint8)}, "p.weight: .*qdata"),
    ):
        with pytest.raises(CheckpointError, match=words):
            dialect.decode("p", good | change)
    del good["p.weight.nested_absmax"]
    with pytest.raises(CheckpointError, match="'p.weight.nested_absmax' is missing"):
        dialect.decode("p", good)


def test_int8_values():
    torch.manual_seed(0)
    qt = formats.get("int8").quantize(torch.randn(200, 64) * 0.05)
    tensors = dialect.encode("p", qt)
    values = bnb.functional.int8_vectorwise_dequant(tensors["p.weight"], tensors["p.SCB"])
    torch.testing.assert_close(values, qt.dequantize(), rtol=3e-7, atol=0)  # it multiplies by 1/127
    back = dialect.decode_int8("p", tensors)
    assert torch.equal(back.qdata, qt.qdata) and torch.equal(back.scale, qt.scale)


def test_int8_scales_survive_both_ways():
    """absmax / 127 * 127 is not always absmax; the stored number gives the scale back exactly."""
    torch.manual_seed(0)
    absmax = torch.rand(100_000) * 10 ** torch.randint(-20, 20, (100_000,))
    scale = (absmax / 127).reshape(-1, 1)
    stored = dialect._row_absmax(scale.reshape(-1))
    assert torch.equal((stored / 127).reshape(-1, 1), scale)


def test_we_read_int8_of_bitsandbytes():
    torch.manual_seed(0)
    weight = torch.randn(40, 96).half()
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight)
    tensors = {"p.weight": codes, "p.SCB": absmax, "p.weight_format": torch.tensor(0)}
    expected = bnb.functional.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(dialect.decode_int8("p", tensors).dequantize(), expected,
                               rtol=3e-7, atol=0)  # fmt: skip


def test_int8_refused():
    good = dialect.encode("p", formats.get("int8").quantize(torch.randn(4, 64)))
    for change, words in (
        ({"p.weight_format": torch.tensor(2)}, "p.weight_format: must be 0"),
        ({"p.SCB": torch.ones(3)}, "p.weight: .*scale"),
        ({"p.weight": torch.ones(4, 64)}, "p.weight: .*qdata"),
    ):
        with pytest.raises(CheckpointError, match=words):
            dialect.decode_int8("p", good | change)
    with pytest.raises(CheckpointError, match="'p.SCB' is missing"):
        dialect.decode_int8("p", {"p.weight": good["p.weight"]})
