"""genaiperf compress through the runner: what it writes, what it says, how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(11))
def test_bad_input_is_one_sentence_and_leaves_nothing(case, tiny_checkpoint, text_file, tmp_path):
    words, expected = bad(tmp_path, tiny_checkpoint, text_file)[case]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, out, err = run(*words)
    assert code == 2
    sentence = next(line for line in err.splitlines() if line.startswith("error: "))
    assert all(word in sentence for word in expected), sentence
    assert "Traceback" not in err and out == ""
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
