"""Reading: values against the safetensors library; every kind of damage named in one sentence."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from genai_perf import CheckpointError
from genai_perf.io import Checkpoint, check_finite
from genai_perf.io.shards import DTYPES


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards and an index."""
    torch.manual_seed(0)
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    shards = {"a.safetensors": {"w": torch.randn(3, 5), "b": torch.randn(7).bfloat16()},
              "b.safetensors": {"s": torch.tensor(2.5), "e": torch.empty(0, 4)}}  # fmt: skip
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": 78}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def refused(path, *words):
    """Opening `path` raises one sentence that holds `words`."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def edit_index(folder, **weight_map):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= weight_map
    file.write_text(json.dumps(index))


def test_tensors_equal_those_of_the_safetensors_library(folder):
    checkpoint = Checkpoint(folder)
    expected = load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors")
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        got = checkpoint.tensor(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
        assert checkpoint.info(name).shape == tuple(tensor.shape)
    assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())


def test_every_dtype(tmp_path):
    tensors = {}
    for name, dtype in DTYPES.items():
        data = torch.arange(1, 17, dtype=torch.uint8)
        tensors[name] = data.bool() if dtype == torch.bool else data.view(dtype)
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        got = checkpoint.tensor(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_writing_to_a_tensor_does_not_write_to_the_file(folder):
    before = (folder / "a.safetensors").read_bytes()
    checkpoint = Checkpoint(folder)
    checkpoint.tensor("w").zero_()
    assert (folder / "a.safetensors").read_bytes() == before
    assert checkpoint.tensor("w").any()


def test_a_pass_keeps_one_tensor_resident(tmp_path):
    import psutil

    (tmp_path / "config.json").write_text("{}")
    save_file({f"w{i}": torch.ones(4 << 20) for i in range(12)}, tmp_path / "model.safetensors")
    checkpoint, process = Checkpoint(tmp_path), psutil.Process()
    start = process.memory_info().rss
    peak = 0
    for name in checkpoint.names():
        assert checkpoint.tensor(name).sum() == 4 << 20
        peak = max(peak, process.memory_info().rss - start)
    assert peak < 3 * (16 << 20), peak  # 12 tensors of 16 MiB


def test_folder_and_config(tmp_path, folder):
    refused(tmp_path / "nothing", "nothing", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a folder")
    for text, words in (("{", ("is not JSON",)), ("[1]", ("JSON object", "list")),
                        ('{"quantization_config": 3}', ())):  # fmt: skip
        (folder / "config.json").write_text(text)
        if words:
            refused(folder, "config.json", *words)
        else:
            with pytest.raises(CheckpointError, match="quantization_config"):
                _ = Checkpoint(folder).quantization
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")


def test_no_weights_and_pickles(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path, "pytorch_model.bin", "pickle")


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_shard(folder, keep):
    data = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(data[:keep])
    refused(folder, "a.safetensors", "truncated")


def test_damaged_header(folder):
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[8] = ord("[")
    (folder / "a.safetensors").write_bytes(data)
    refused(folder, "a.safetensors", "header")
    length = int.from_bytes(data[:8], "little")
    for old, new in ((b'"F32"', b'"F99"'), (b"[3,5]", b"[3,6]"), (b"[3,5]", b"[3,-")):
        damaged = bytes(data[:8]) + b"{" + bytes(data[9 : 8 + length]).replace(old, new, 1)
        (folder / "a.safetensors").write_bytes(damaged + bytes(data[8 + length :]))
        refused(folder, "a.safetensors", "header")


@pytest.mark.parametrize("shard, words", [
    ("c.safetensors", ("c.safetensors", "missing")),
    ("../outside.safetensors", ("outside",)),
    ("sub/../../outside.safetensors", ("outside",)),
    ("/etc/hostname", ("outside",)),
    ("..\\outside.safetensors", ("outside",)),
    ("pytorch_model.bin", ("pickle",)),
    (7, ("file name",)),
    ("b.safetensors", ("'w'", "b.safetensors")),
])  # fmt: skip
def test_index_entries(folder, shard, words):
    (folder.parent / "outside.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    edit_index(folder, w=shard)
    refused(folder, "index.json", *words)


def test_index_without_weight_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "weight_map")


def test_link_out_of_the_folder(folder):
    target = folder.parent / "outside.safetensors"
    os.rename(folder / "a.safetensors", target)
    (folder / "a.safetensors").symlink_to(target)
    refused(folder, "a.safetensors", "outside")


def test_links_of_the_hub_cache_are_followed(folder):
    cache = folder.parent / "models--x"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = folder.rename(cache / "snapshots" / "abc")
    os.rename(snapshot / "a.safetensors", cache / "blobs" / "123")
    (snapshot / "a.safetensors").symlink_to("../../blobs/123")
    assert Checkpoint(snapshot).tensor("w").shape == (3, 5)


def test_missing_tensor_is_named(folder):
    with pytest.raises(CheckpointError, match="'nothing'"):
        Checkpoint(folder).tensor("nothing")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_check_finite_names_tensor_and_place(dtype):
    weight = torch.ones(4, 6)
    check_finite("a.weight", weight.to(dtype))
    weight[2, 3] = float("nan")
    with pytest.raises(CheckpointError, match=re.escape("'a.weight' holds nan at [2, 3]")):
        check_finite("a.weight", weight.to(dtype))


def test_check_finite_edges():
    check_finite("big", torch.full((64,), 3e38))  # the sum overflows, the values do not
    check_finite("codes", torch.zeros(3, dtype=torch.int8))
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        values = codes.view(dtype)
        check_finite("all numbers", values[torch.isfinite(values.float())])
        for code in values[~torch.isfinite(values.float())]:
            with pytest.raises(CheckpointError, match="'w' holds"):
                check_finite("w", code[None])
    check_finite("empty", torch.empty(0))
    with pytest.raises(CheckpointError, match="inf"):
        check_finite("w", torch.tensor([float("inf"), float("-inf")]))
