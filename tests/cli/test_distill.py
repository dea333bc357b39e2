"""genaiperf distill and genaiperf distill cache through the runner."""

import json

import pytest
from typer.testing import CliRunner

from genai_perf.cli import app
from genai_perf.distill import TeacherCache

FEW = ["--steps", 4, "--batch", 2, "--seqlen", 32, "--save-every", 2]


def run(*words) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["distill", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_student_by_layers_resumed(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    words = ["--teacher", tiny_checkpoint, "--text", text_file, "--layers", 1, "--alpha", 0.5, *FEW]
    code, out, err = run("--out", tmp_path / "s", *words)
    assert code == 0, err
    assert "held-out loss" in out and "4/4" in err
    record = json.loads((tmp_path / "s" / "distill.json").read_text())
    assert record["finished"] and record["curve"][-1]["step"] == 4
    assert record["settings"]["alpha"] == 0.5
    assert (tmp_path / "s" / "loss.svg").read_text().startswith("<svg")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "model")
    assert model.config.num_hidden_layers == 1
    assert run("--out", tmp_path / "s", *words)[0] == 2
    # Interrupted after step 2, then resumed: the same model.
    from genai_perf.cli.console import Stages

    def stop(self, stage, done, total, what=""):
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "update", stop)
        assert run("--out", tmp_path / "r", *words)[0] == 130
    code, _, err = run("--out", tmp_path / "r", *words, "--resume")
    assert code == 0, err
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_cache_then_student(tiny_checkpoint, text_file, tmp_path):
    words = ["cache", tiny_checkpoint, text_file, tmp_path / "c", "--top-k", 8, "--seqlen", 32,
             "--limit", 9]  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    assert "9 windows of 32 tokens, top 8" in out and "9/9" in err
    assert len(TeacherCache(tmp_path / "c")) == 9
    assert run(*words)[0] == 0
    code, _, err = run("cache", tiny_checkpoint, text_file, tmp_path / "c", "--top-k", 9)
    assert code == 2 and "is the cache of another" in err
    code, out, err = run("--student", tiny_checkpoint, "--cache", tmp_path / "c", "--out",
                         tmp_path / "s", *FEW)  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out must name the folder"),
        (["--out", "x"], "the student must be one of"),
        (["--out", "x", "--layers", 1, "--temperature", 0], "temperature must be positive, got 0"),
        (["--out", "x", "--layers", 9, "--teacher", "nowhere"], "is no checkpoint folder"),
        (["--out", "x", "--layers", 1, "--resume"], "holds no checkpoint to go on from"),
        (["--out", "x", "--layers", 1, "--kind", "kl"], "kind must be one of"),
    ],
)
def test_bad_input_is_one_sentence(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words)
    assert code == 2 and message in " ".join(err.split())
