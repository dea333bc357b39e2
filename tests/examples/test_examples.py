"""Every example that a user would copy runs, with sizes of a test."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *arguments) -> what it printed."""

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_plain_training_loop(run):
    out = run("plain_training_loop.py", "--steps", 12, "--sequences", 4, "--seqlen", 64,
              "--width", 32, "--layers", 1)  # fmt: skip
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3


def test_transformers_trainer(run, tmp_path):
    from transformers import AutoModelForCausalLM

    out = run("transformers_trainer.py", "--out", tmp_path / "tuned", "--steps", 2, "--batch", 2,
              "--seqlen", 48)  # fmt: skip
    assert "train_loss" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")


def test_quantize_model(run):
    out = run("quantize_model.py", "--tokens", 6)
    assert "-> genai_perf" in out and "quantized 28 layers" in out and "def main(" in out
    before, after = (float(part.split()[-1]) for part in out.split(" MB")[:2])
    assert after < 0.5 * before


def test_compress_checkpoint(run, tmp_path):
    out = run("compress_checkpoint.py", "--out", tmp_path / "small", "--recipe", "int4-gptq",
              "--samples", 2, "--seqlen", 64)  # fmt: skip
    assert "4/4" in out and "def main(" in out
    assert (tmp_path / "small" / "report.json").exists()


TRIED = {
    "plain_training_loop.py",
    "transformers_trainer.py",
    "quantize_model.py",
    "compress_checkpoint.py",
}


@pytest.mark.parametrize("name", sorted({p.name for p in EXAMPLES.glob("*.py")} - TRIED))
def test_longer_ones_start(run, name, monkeypatch, capsys):
    """Those that train for minutes: everything they import is there."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
