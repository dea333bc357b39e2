"""The teacher cache: what is written is what is read, an interruption loses nothing, nothing
foreign is accepted."""

import json
from dataclasses import replace

import pytest
import torch

import genai_perf as gp
from genai_perf.distill import TeacherCache, TopK
from genai_perf.distill.cache import Identity, text_hash, vocabulary_hash, write_cache

WINDOWS = torch.arange(7 * 5).view(7, 5) % 11
IDENTITY = Identity("t" * 64, vocabulary_hash({"a": 0}), text_hash(WINDOWS), 11, 3, 1.0, 7, 5)
SHARD = 2 * 5 * (4 + 6 * 3)  # two windows


def teacher(ids, calls=None):
    if calls is not None:
        calls.append(len(ids))
    generator = torch.Generator().manual_seed(int(ids.sum()))
    return TopK.from_logits(torch.randn(*ids.shape, 11, generator=generator), 3)


def write(path, calls=None, identity=IDENTITY, windows=WINDOWS, **options):
    return write_cache(path, windows, lambda ids: teacher(ids, calls), identity, batch=1,
                       shard_bytes=SHARD, **options)  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    told = []
    cache = write(tmp_path / "c", progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)] and len(cache) == 7
    cache.verify()
    for i in range(7):
        assert torch.equal(cache.tokens(i), WINDOWS[i])
    got, want = cache.teacher([6, 0]), [teacher(WINDOWS[i : i + 1]) for i in (6, 0)]
    assert torch.equal(got.ids, torch.cat([w.ids for w in want]))
    expected = torch.cat([w.logprobs for w in want])
    torch.testing.assert_close(got.logprobs, expected, atol=2e-3, rtol=0)
    assert got.logprobs.dtype == torch.float32 and got.temperature == 1.0
    loss = gp.distill.distillation_loss(torch.zeros(2, 5, 11), got)
    assert torch.isfinite(loss)


def test_an_interrupted_cache_goes_on(tmp_path):
    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c", calls, progress=stop)
    with pytest.raises(gp.CheckpointError, match="was interrupted: run the same command again"):
        TeacherCache(tmp_path / "c")
    assert len(calls) == 4
    cache = write(tmp_path / "c", calls)
    assert len(calls) == 7 and torch.equal(cache.tokens(6), WINDOWS[6])
    whole = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
    write(tmp_path / "d")
    assert whole == {f.name: f.read_bytes() for f in (tmp_path / "d").iterdir()}
    write(tmp_path / "c", calls)
    assert len(calls) == 7


def test_a_damaged_shard_is_noticed_and_written_again(tmp_path):
    cache, calls = write(tmp_path / "c"), []
    shard = tmp_path / "c" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(gp.CheckpointError, match="shard-00001.safetensors: damaged"):
        cache.verify()
    write(tmp_path / "c", calls).verify()
    assert len(calls) == 2
    shard.write_bytes(data[:-40])
    with pytest.raises(gp.CheckpointError, match="truncated"):
        TeacherCache(tmp_path / "c")


@pytest.mark.parametrize("name", ["teacher", "tokenizer", "vocab_size", "temperature"])
def test_a_cache_of_something_else_is_refused(tmp_path, name):
    write(tmp_path / "c")
    other = {"teacher": "u" * 64, "tokenizer": "v" * 64, "vocab_size": 12, "temperature": 2.0}[name]
    with pytest.raises(gp.CheckpointError, match=f"is the cache of another {name}"):
        write(tmp_path / "c", identity=replace(IDENTITY, **{name: other}))


def test_another_text_or_tokenizer_is_refused(tmp_path):
    cache = write(tmp_path / "c")
    cache.check(text=text_hash(WINDOWS), tokenizer=vocabulary_hash({"a": 0}))
    with pytest.raises(gp.CheckpointError, match="is the cache of another text"):
        cache.check(text=text_hash(WINDOWS + 1))
    with pytest.raises(gp.CheckpointError, match="is the cache of another tokenizer"):
        cache.check(tokenizer=vocabulary_hash({"b": 0}))
    with pytest.raises(gp.CheckpointError, match="another text"):
        write(tmp_path / "c", identity=replace(IDENTITY, text=text_hash(WINDOWS + 1)),
              windows=WINDOWS + 1)  # fmt: skip
    with pytest.raises(ValueError, match="windows must be the text of the identity"):
        write(tmp_path / "e", windows=WINDOWS + 1)


def test_folders_that_are_no_caches(tmp_path):
    with pytest.raises(gp.CheckpointError, match="is no teacher cache"):
        TeacherCache(tmp_path)
    (tmp_path / "x").write_text("x")
    with pytest.raises(gp.CheckpointError, match="exists and is no teacher cache"):
        write(tmp_path)
    write(tmp_path / "c")
    manifest = tmp_path / "c" / "cache.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(gp.CheckpointError, match="cache of version 2"):
        TeacherCache(tmp_path / "c")
    manifest.write_text("{")
    with pytest.raises(gp.CheckpointError, match="cache.json is damaged"):
        TeacherCache(tmp_path / "c")
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index must be from 0 to 6, got 7"):
        TeacherCache(tmp_path / "c").tokens(7)
