"""gp.compress broken off and repeated: the same bytes as if nothing had happened."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import genai_perf as gp
from genai_perf.compression import GPTQ, Recipe, SparseGPT
from genai_perf.io import resume

IDS = torch.randint(1, 96, (20, 16), generator=torch.Generator().manual_seed(0))


def files(folder):
    """Name -> bytes, without what says how long it took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("report.json"))
    for layer in report["layers"]:
        layer["seconds"] = 0
    return found, {**report, "seconds": 0, "peak_rss_bytes": 0}


def broken_off(at, *args, **options):
    """A call that is interrupted when it comes to block `at`."""

    def stop(done, total, what):
        if done == at and what not in ("embedding", "done"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gp.compress(*args, **options, progress=stop)


class Computed:
    """Counts the blocks whose linears were compressed, not replayed."""

    def __init__(self, monkeypatch):
        from genai_perf.compression import apply

        self.blocks = 0
        original = apply._compress_block

        def count(*args):
            self.blocks += 1
            return original(*args)

        monkeypatch.setattr(apply, "_compress_block", count)


BF16 = torch.bfloat16


@pytest.mark.parametrize("family, dtype, recipe, options", [
    ("llama", BF16, "int8-rtn", {"int8": "pack-quantized"}),
    ("llama-tied", BF16, Recipe((GPTQ(group_size=32, symmetric=False),)), {}),
    ("llama", torch.float32, "fp8-rtn", {}),
    ("gpt2", torch.float32, "sparsegpt-2:4", {"activations": "disk"}),
    ("gpt2", BF16, "nf4-rtn", {}),
    ("gpt-oss", BF16, "sparsegpt-2:4", {}),
    ("opt", torch.float32, Recipe((SparseGPT(sparsity=0.5), GPTQ(group_size=32))),
     {"max_shard_size": 60_000}),
])  # fmt: skip
def test_goes_on_from_every_block(saved, tmp_path, monkeypatch, family, dtype, recipe, options):
    src, options = saved(family, dtype), {"calibration": IDS, **options}
    in_memory = {**options, "activations": "memory"}
    gp.compress(src, tmp_path / "whole", recipe, **in_memory)
    computed = Computed(monkeypatch)
    for at in (1, 2):
        dst = tmp_path / f"from{at}"
        broken_off(at, src, dst, recipe, **options)
        assert not dst.exists() and (tmp_path / f".from{at}.partial").exists()
        computed.blocks = 0
        gp.compress(src, dst, recipe, **options)
        assert computed.blocks == 3 - at
        assert files(dst) == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


class Killed(BaseException):
    pass


WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Kill:
    """Ends the call at its n-th change to the disk under a folder, and cleans nothing up."""

    def __init__(self):
        self.folder, self.left = None, 0
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.folder is None or event not in WATCHED:
            return
        if event == "open" and not (isinstance(args[1], str) and "w" in args[1]):
            return
        if str(args[0]).startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                self.folder = None
                raise Killed


@pytest.fixture(scope="module")
def kill():
    return Kill()


def test_killed_between_any_two_changes_to_the_disk(saved, tmp_path, monkeypatch, kill):
    src = saved("llama")
    options = {"max_shard_size": 150_000}  # several shards, joined of several parts
    gp.compress(src, tmp_path / "whole", "int8-rtn", **options)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1

    monkeypatch.setattr(resume.ResumableWriter, "__exit__", lambda self, *e: self._journal.close())
    for n in range(1, 1000):
        kill.folder, kill.left = str(tmp_path), n
        try:
            gp.compress(src, tmp_path / "out", "int8-rtn", **options)
            kill.folder = None
            break
        except Killed:
            # complete or not there at all
            assert not (tmp_path / "out").exists() or files(tmp_path / "out")
        if (tmp_path / "out").exists():
            with pytest.raises(gp.CheckpointError, match="exists"):
                gp.compress(src, tmp_path / "out", "int8-rtn", **options)
        else:
            gp.compress(src, tmp_path / "out", "int8-rtn", **options)
        assert files(tmp_path / "out") == files(tmp_path / "whole")
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()
        assert not list(tmp_path.glob(".*"))
    assert n > 40


def test_other_settings_are_refused_and_a_restart_drops_the_blocks(saved, tmp_path, monkeypatch):
    src, dst = saved("llama"), tmp_path / "out"
    broken_off(2, src, dst, "int8-rtn", calibration=IDS)
    for words, args, options in (
        ("another recipe:", (src, dst, "fp8-rtn"), {"calibration": IDS}),
        ("another calibration:", (src, dst, "int8-rtn"), {"calibration": IDS[:10]}),
        ("another source:", (saved("llama-tied"), dst, "int8-rtn"), {"calibration": IDS}),
        ("another layout of int8:", (src, dst, "int8-rtn"),
         {"calibration": IDS, "int8": "pack-quantized"}),
    ):  # fmt: skip
        with pytest.raises(gp.CheckpointError, match=f"2 finished parts of a run with {words}"):
            gp.compress(*args, **options)
    computed = Computed(monkeypatch)
    gp.compress(src, dst, "fp8-rtn", calibration=IDS, restart=True)
    assert computed.blocks == 3 and not list(tmp_path.glob(".*"))


def test_a_finished_part_that_was_damaged_is_made_again(saved, tmp_path, monkeypatch):
    src, dst = saved("llama"), tmp_path / "out"
    gp.compress(src, tmp_path / "whole", "int8-rtn")
    broken_off(2, src, dst, "int8-rtn")
    part = tmp_path / ".out.partial" / "folder" / "part-000001"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    computed = Computed(monkeypatch)
    gp.compress(src, dst, "int8-rtn")
    assert computed.blocks == 2 and files(dst) == files(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_folder(saved, tmp_path):
    src, dst = saved("llama"), tmp_path / "out"

    def meanwhile(done, total, what):
        if done == 1:
            with pytest.raises(gp.CheckpointError, match="another process is writing"):
                gp.compress(src, dst, "int8-rtn")

    gp.compress(src, dst, "int8-rtn", progress=meanwhile)


def test_before_the_first_block_nothing_stays(saved, tmp_path):
    broken_off(0, saved("llama"), tmp_path / "out", "int8-rtn")
    assert not list(tmp_path.iterdir())


def test_an_error_says_that_blocks_are_kept(saved, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for path in saved("llama").iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5] = 3e38
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(gp.CalibrationError, match=r"layers\.1.*; 1 finished blocks are kept"):
        gp.compress(src, tmp_path / "out", "int8-rtn", calibration=IDS)
    assert (tmp_path / ".out.partial").exists()


def test_a_full_disk_keeps_the_finished_blocks(saved, tmp_path, monkeypatch):
    import errno

    src, dst = saved("llama"), tmp_path / "out"
    write = resume.write_file
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(resume, "write_file", full)
    with pytest.raises(gp.CheckpointError, match="the disk is full; 2 finished blocks are kept"):
        gp.compress(src, dst, "int8-rtn")
    gp.compress(src, dst, "int8-rtn")
    assert len(calls) == 3 + 1 + len([n for n in load_file(dst / "model.safetensors")
                                      if "layers" not in n])  # fmt: skip
