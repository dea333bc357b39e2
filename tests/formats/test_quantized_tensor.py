"""QuantizedTensor survives what tensors go through: state_dict, safetensors, deepcopy, .to()."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import genai_perf as gp
from genai_perf import formats
from genai_perf.ops.quantize.cases import VARIANTS

ALL = [pytest.param(*variant, id=name) for name, variant in VARIANTS.items()]


def make(format, options, shape=(5, 200), dtype=torch.bfloat16):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return formats.get(format).quantize(x, **options)


def assert_same(a, b):
    assert (a.format, a.shape, a.dtype, a.group_size) == (b.format, b.shape, b.dtype, b.group_size)
    assert a.components().keys() == b.components().keys()
    for name, tensor in a.components().items():
        other = b.components()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor.float(), other.float())
    assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize(("format", "options"), ALL)
def test_round_trips(format, options, tmp_path):
    qt = make(format, options)
    assert_same(gp.QuantizedTensor.from_state_dict(qt.state_dict()), qt)
    state = qt.state_dict("layer.weight.")
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    save_file(state, tmp_path / "weight.safetensors")
    loaded = load_file(tmp_path / "weight.safetensors")
    assert_same(gp.QuantizedTensor.from_state_dict(loaded, "layer.weight."), qt)
    twin = copy.deepcopy(qt)
    assert_same(twin, qt)
    assert twin.qdata.data_ptr() != qt.qdata.data_ptr()
    assert_same(qt.to("cpu"), qt)
    assert_same(qt, make(format, options))


@pytest.mark.parametrize(("format", "options"), ALL)
def test_meta_device_keeps_shapes(format, options):
    moved = make(format, options).to("meta")
    assert moved.device.type == "meta"
    moved.check()


def test_attributes():
    qt = make("int4", {"group_size": 64, "symmetric": False}, (6, 128))
    assert qt.shape == (6, 128) and qt.dtype == torch.bfloat16 and qt.device.type == "cpu"
    assert list(qt.components()) == ["qdata", "scale", "zero_point"]
    assert qt.nbytes == 6 * 64 + 6 * 2 * 4 + 6 * 2
    assert qt.dequantize().dtype == torch.bfloat16
    assert qt.dequantize(torch.float32).dtype == torch.float32
    assert "int4" in repr(qt) and "group_size=64" in repr(qt)


def test_bits_a_weight():
    shape = (256, 1024)
    bits = {name: make(*variant, shape).nbytes * 8 / (256 * 1024)
            for name, variant in VARIANTS.items()}  # fmt: skip
    assert bits["nf4"] == 4.5
    assert bits["nf4-double"] == pytest.approx(4.127, abs=1e-3)
    assert bits["int4"] == 4.25
    assert bits["int8"] == pytest.approx(8.03, abs=0.01)


def test_an_odd_number_of_elements_and_missing_keys():
    qt = make("nf4", {}, (3, 7))
    state = qt.state_dict("w.")
    for key in ("w.qdata", "w.scale", "w.meta"):
        broken = {k: v for k, v in state.items() if k != key}
        with pytest.raises(gp.CheckpointError, match=f"{key} is missing"):
            gp.QuantizedTensor.from_state_dict(broken, "w.")


@pytest.mark.parametrize(("change", "words"), [
    ({"format": "int3.5"}, "format must be one of"),
    ({"shape": [5, 999]}, "must be"),
    ({"shape": "many"}, "does not describe"),
    ({"dtype": "float8"}, "does not describe"),
    ({"group_size": 7}, "group_size"),
])  # fmt: skip
def test_a_meta_that_lies_is_refused(change, words):
    state = make("int4", {}).state_dict()
    meta = json.loads(bytes(state["meta"].tolist())) | change
    state["meta"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    with pytest.raises(gp.CheckpointError, match=words):
        gp.QuantizedTensor.from_state_dict(state)


def test_a_meta_that_is_no_json_is_refused():
    state = make("int8", {}).state_dict()
    state["meta"] = torch.tensor([123, 1, 2], dtype=torch.uint8)
    with pytest.raises(gp.CheckpointError, match="meta does not describe"):
        gp.QuantizedTensor.from_state_dict(state)


def test_components_must_fit_their_format():
    state = make("nf4", {"double_quant": True}).state_dict("w.")
    with pytest.raises(gp.CheckpointError, match="w.scale_offset must be .*, got absent"):
        broken = {k: v for k, v in state.items() if k != "w.scale_offset"}
        gp.QuantizedTensor.from_state_dict(broken, "w.")
    with pytest.raises(gp.CheckpointError, match="w.qdata must be torch.uint8"):
        gp.QuantizedTensor.from_state_dict(state | {"w.qdata": state["w.qdata"].int()}, "w.")
