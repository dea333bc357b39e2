"""Writing: read back by the safetensors library; all or nothing whatever happens."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from genai_perf import CheckpointError
from genai_perf.io import Checkpoint, ShardWriter, shards


def tensors(seed: int, n: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {f"t{seed}.{i}": torch.randn(8, 4, generator=g) for i in range(n)}
    found[f"t{seed}.odd"] = torch.randint(0, 255, (5,), generator=g, dtype=torch.uint8)
    found[f"t{seed}.bf16"] = torch.randn(4, 6, generator=g).T.bfloat16()  # not contiguous
    return found


def write(dst, parts, **kwargs):
    with ShardWriter(dst, **kwargs) as writer:
        for part in parts:
            writer.write(part)
        return writer.commit({"model_type": "llama"})


def check(dst, parts):
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    stored = {}
    for file in dst.glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    checkpoint = Checkpoint(dst)
    assert all(torch.equal(checkpoint.tensor(name), expected[name]) for name in expected)
    return expected


def test_one_shard(tmp_path):
    parts = [tensors(seed) for seed in range(4)]
    dst = write(tmp_path / "out", parts)
    assert sorted(f.name for f in dst.iterdir()) == ["config.json", "model.safetensors"]
    check(dst, parts)


def test_shards_and_index(tmp_path):
    parts = [tensors(seed) for seed in range(5)]
    dst = write(tmp_path / "out", parts, max_shard_size=1000)
    expected = check(dst, parts)
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    names = sorted({*index["weight_map"].values()})
    total = len(names)
    assert names == [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    assert total == len(list(dst.glob("*.safetensors"))) > 1
    for name, shard in index["weight_map"].items():
        assert name in load_file(dst / shard)
    for shard in names:
        assert sum(t.nbytes for t in load_file(dst / shard).values()) <= 1000


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    part = {"small": torch.ones(2), "large": torch.ones(1000), "last": torch.ones(3)}
    dst = write(tmp_path / "out", [part], max_shard_size="1KB")
    check(dst, [part])
    assert len(list(dst.glob("*.safetensors"))) == 3


def test_carries_tokenizer_files_and_no_code_or_weights(tmp_path):
    source = tmp_path / "src"
    (source / "additional_chat_templates").mkdir(parents=True)
    carried = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
               "tokenizer.model", "generation_config.json", "chat_template.jinja", "vocab.json",
               "additional_chat_templates/rag.jinja"]  # fmt: skip
    left = ["config.json", "model.safetensors", "model.safetensors.index.json", "modeling_x.py",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "report.json"]  # fmt: skip
    for name in carried + left:
        (source / name).write_text(name)
    dst = write(tmp_path / "out", [tensors(0)], source=source)
    for name in carried:
        assert (dst / name).read_text() == name
    found = {str(f.relative_to(dst)) for f in dst.rglob("*") if f.is_file()}
    assert found == {*carried, "config.json", "model.safetensors"}
    assert json.loads((dst / "config.json").read_text()) == {"model_type": "llama"}


def nothing_left(tmp_path, *but):
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(but)


def test_destination_exists(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists"):
        ShardWriter(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no.* does not exist"):
        ShardWriter(tmp_path / "no" / "out")
    nothing_left(tmp_path, "out")


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "out") as writer:
        writer.write(tensors(0))
        raise RuntimeError
    nothing_left(tmp_path)
    with ShardWriter(tmp_path / "out") as writer:
        writer.write(tensors(0))  # never committed
    nothing_left(tmp_path)


def test_destination_that_appears_meanwhile_is_not_touched(tmp_path):
    with pytest.raises(CheckpointError, match="exists"), ShardWriter(tmp_path / "out") as writer:
        writer.write(tensors(0))
        (tmp_path / "out").mkdir()
        writer.commit({})
    nothing_left(tmp_path, "out")
    assert not any((tmp_path / "out").iterdir())


def test_disk_full(tmp_path, monkeypatch):
    def full(file, content):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("genai_perf.io.writer.write_file", full)
    with pytest.raises(CheckpointError, match="out: the disk is full"):
        write(tmp_path / "out", [tensors(0)])
    nothing_left(tmp_path)


def test_disk_full_while_joining(tmp_path, monkeypatch):
    def full(parts, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("genai_perf.io.writer.join_files", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(tmp_path / "out", [tensors(0), tensors(1)])
    nothing_left(tmp_path)


def test_no_permission(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # a mode would not stop root
    with pytest.raises(CheckpointError, match="out: cannot be written: Permission denied"):
        ShardWriter(tmp_path / "out")


def test_a_name_twice(tmp_path):
    with pytest.raises(CheckpointError, match="'t0.0' is written twice"):
        write(tmp_path / "out", [tensors(0), tensors(0)])
    nothing_left(tmp_path)


@pytest.mark.parametrize("size, expected", [("5GB", 5 * 10**9), ("64 MiB", 2**26), (7, 7)])
def test_sizes(tmp_path, size, expected):
    with ShardWriter(tmp_path / "out", max_shard_size=size) as writer:
        assert writer.max_shard_size == expected


@pytest.mark.parametrize("size", ["5 parsecs", "", "-3GB", 0, -1])
def test_bad_sizes(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        ShardWriter(tmp_path / "out", max_shard_size=size)
    nothing_left(tmp_path)


def test_joined_tensors_start_on_their_item_size(tmp_path):
    dst = write(tmp_path / "out", [tensors(seed) for seed in range(3)])
    for info in shards.read_header(dst / "model.safetensors").values():
        assert info.start % info.dtype.itemsize == 0
