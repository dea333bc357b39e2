"""genaiperf compress through the runner: what it writes, what it says, how it fails."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from genai_perf.cli import app


def run(*words) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["compress", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_recipe_that_needs_no_text(tiny_checkpoint, tmp_path):
    code, out, err = run(tiny_checkpoint, tmp_path / "int8", "--recipe", "int8-rtn")
    assert code == 0, err
    assert "tiny-random -> int8-rtn" in out
    assert f"{tmp_path / 'int8'}: written" in out
    assert "Blocks" in err and "2/2" in err
    assert "calibrating" not in err
    report = json.loads((tmp_path / "int8" / "report.json").read_text())
    assert report["calibration"] is None


def test_without_calibration_the_standard_library_is_used_and_named(tiny_checkpoint, tmp_path):
    code, _, err = run(tiny_checkpoint, tmp_path / "out", "--recipe", "int4-gptq", "--samples", 4,
                       "--max-seqlen", 32)  # fmt: skip
    assert code == 0, err
    assert "no --calibration given" in err and "standard library" in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["calibration"]["windows"], report["calibration"]["max_seqlen"]) == (4, 32)


def test_calibration_and_recipe_from_files(tiny_checkpoint, text_file, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps:\n  - {method: sparsegpt, sparsity: 0.25}\n")
    code, _, err = run(tiny_checkpoint, tmp_path / "out", "--recipe", recipe, "--samples", 4,
                       "--calibration", text_file, "--max-seqlen", 64)  # fmt: skip
    assert code == 0, err
    assert "no --calibration given" not in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["totals"]["sparsity"] == pytest.approx(0.25, abs=0.01)


def test_torchrun(tiny_checkpoint, tmp_path):
    """Two processes write one folder, and the first alone speaks."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "genai_perf", "compress", str(tiny_checkpoint), str(tmp_path / "out"),
            "--recipe", "int4-gptq", "--samples", "4", "--max-seqlen", "32"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out: written") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["windows"] == 4
    assert all(layer["tokens"] == 4 * 32 for layer in report["layers"])


def test_pack_sparse_writes_the_side_file_too(tiny_checkpoint, tmp_path):
    import genai_perf as gp

    code, out, err = run(tiny_checkpoint, tmp_path / "out", "--recipe", "magnitude-2:4+int8-rtn",
                         "--pack-sparse")  # fmt: skip
    assert code == 0, err
    side = tmp_path / "out" / "sparse_weights.gpst"
    assert f"{side}: 14 layers in" in out and side.exists()
    layers = [m for m in gp.load_compressed(tmp_path / "out").modules()
              if isinstance(m, gp.nn.SparseLinear)]  # fmt: skip
    assert len(layers) == 14


def bad(tmp_path, tiny_checkpoint, text_file):
    """(words, what the sentence must hold)"""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "exists").mkdir()
    (tmp_path / "no-config").mkdir()
    (tmp_path / "typo.json").write_text('{"steps": [{"method": "gptq", "bitz": 4}]}')
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    damaged = {"shape": dict(tensors), "vocabulary": dict(tensors)}
    name = "model.layers.1.mlp.up_proj.weight"
    damaged["shape"][name] = tensors[name][:-8].contiguous()
    name = "model.embed_tokens.weight"
    damaged["vocabulary"][name] = tensors[name][:1000].contiguous()
    for folder, held in (*damaged.items(), ("cut", tensors)):
        shutil.copytree(tiny_checkpoint, tmp_path / folder)
        save_file(held, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    with open(tmp_path / "cut" / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "vocabulary" / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    (tmp_path / "short.txt").write_text("import os")
    new = tmp_path / "new"
    return [
        ((tiny_checkpoint, new, "--recipe", "int4-gtpq"), ["int4-gtpq", "int4-gptq"]),
        ((tiny_checkpoint, new, "--recipe", tmp_path / "typo.json"), ["bitz", "bits"]),
        ((tiny_checkpoint, new, "--recipe", tmp_path / "no.yaml"), ["no.yaml"]),
        ((tmp_path / "nowhere", new, "--recipe", "int8-rtn"), ["nowhere"]),
        ((tmp_path / "no-config", new, "--recipe", "int8-rtn"), ["no-config"]),
        ((tiny_checkpoint, tmp_path / "exists", "--recipe", "int8-rtn"), ["exists"]),
        ((tiny_checkpoint, new, "--recipe", "int4-gptq", "--calibration", tmp_path / "empty.txt"),
         ["empty.txt", "empty"]),
        ((tiny_checkpoint, new, "--recipe", "int4-gptq", "--calibration", tmp_path / "binary.txt"),
         ["binary.txt", "text"]),
        ((tiny_checkpoint, new, "--recipe", "int4-gptq", "--calibration", text_file,
          "--max-seqlen", 9999), ["9999", "256"]),
        ((tiny_checkpoint, new, "--recipe", "int4-gptq", "--calibration", text_file,
          "--samples", 0), ["n_samples", "0"]),
        ((tiny_checkpoint, new, "--recipe", "int8-rtn", "--pack-sparse"),
         ["--pack-sparse", "int8-rtn prunes nothing"]),
        ((tmp_path / "cut", new, "--recipe", "int4-rtn"), ["model.safetensors", "truncated"]),
        ((tmp_path / "shape", new, "--recipe", "int4-rtn"), ["layers.1.mlp.up_proj", "[88, 64]"]),
        ((tmp_path / "vocabulary", new, "--recipe", "int4-gptq", "--calibration", text_file),
         ["tokenizer", "vocabulary has 1000"]),
        ((tiny_checkpoint, new, "--recipe", "int4-gptq", "--calibration", tmp_path / "short.txt"),
         ["fewer than one window"]),
        ((tiny_checkpoint, tmp_path / "short.txt" / "new", "--recipe", "int4-rtn"), ["short.txt"]),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(16))
def test_bad_input_is_one_sentence_and_leaves_nothing(case, tiny_checkpoint, text_file, tmp_path):
    words, expected = bad(tmp_path, tiny_checkpoint, text_file)[case]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, out, err = run(*words)
    assert code == 2
    sentence = next(line for line in err.splitlines() if line.startswith("error: "))
    assert all(word in sentence for word in expected), sentence
    assert "Traceback" not in err and out == ""
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def overflowing(tiny_checkpoint, tmp_path):
    """The checkpoint in fp32, whose second block gives infinity."""
    src = tmp_path / "overflows"
    shutil.copytree(tiny_checkpoint, src)
    tensors = {name: t.float() for name, t in load_file(src / "model.safetensors").items()}
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.{part}.weight"] *= 1e16
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return src


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["activations", "disk"])
def test_finished_blocks_are_kept(what, tiny_checkpoint, text_file, tmp_path, monkeypatch):
    from genai_perf.io import resume

    src = overflowing(tiny_checkpoint, tmp_path) if what == "activations" else tiny_checkpoint
    words = (src, tmp_path / "out", "--recipe", "int4-gptq", "--calibration", text_file,
             "--samples", 4, "--max-seqlen", 32)  # fmt: skip
    if what == "disk":
        write, count = resume.ResumableWriter.write, iter(range(9))
        monkeypatch.setattr(resume.ResumableWriter, "write", lambda *args, **kwargs: (
            write(*args, **kwargs) if next(count) < 1 else no_space()))  # fmt: skip
    code, out, err = run(*words)
    assert code == 2 and out == ""
    sentence = next(line for line in err.splitlines() if line.startswith("error: "))
    assert ("layers.1" in sentence) if what == "activations" else ("No space left" in sentence)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    assert any(file.stat().st_size > 10_000 for file in partial.rglob("*"))
    if what == "disk":  # the same command goes on from there
        monkeypatch.undo()
        assert run(*words)[0] == 0
