"""The example's training loop: resuming changes nothing; bad arguments are named."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from genai_perf.models import stdlib_text

pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [np.array([0, *rng.integers(1, 128, 50)], np.uint16) for _ in range(12)]


def make_run(folder, **changes):
    from tiny_lm.model import Config, TinyLM
    from tiny_lm.train import Run, Settings

    torch.manual_seed(0)
    config = Config(vocab_size=128, hidden=64, layers=1, nheads=2, nheads_k=1, headdim=32,
                    intermediate=64)  # fmt: skip
    settings = {
        "steps": 8,
        "batch": 2,
        "seqlen": 16,
        "long_seqlen": 32,
        "warmup": 2,
        "log_every": 4,
        "eval_every": 8,
    }
    folder.mkdir(exist_ok=True)
    return Run(TinyLM(config), Settings(**settings | changes), folder / "checkpoint.pt")


def test_batches_are_the_same_after_a_skip_and_no_token_comes_twice(documents):
    from tiny_lm.corpus import batches

    def take(n, start):
        data = batches(documents, batch=2, seqlen=16, seed=3, start=start)
        return [next(data) for _ in range(n)]

    whole = take(40, 0)
    for skipped in (1, 17, 35):
        for a, b in zip(whole[skipped:], take(40 - skipped, skipped), strict=True):
            assert torch.equal(a, b)
    epoch = (sum(map(len, documents)) - 16) // 34
    counts = np.bincount(np.concatenate(documents), minlength=128)
    seen = torch.cat([b.flatten() for b in whole[:epoch]])
    assert (np.bincount(seen, minlength=128) <= counts).all()


def test_held_out_batches_predict_every_token_once(documents):
    from tiny_lm.corpus import held_out_batches

    row = np.concatenate(documents).astype(np.int64)
    pieces = held_out_batches(documents, batch=4, seqlen=16)
    predicted = torch.cat([b[:, 1:].flatten() for b in pieces])
    assert len(row) - 1 - len(predicted) < 16
    assert torch.equal(predicted, torch.from_numpy(row[1 : len(predicted) + 1]))


def test_unigram_entropy_of_uniform_tokens():
    from tiny_lm.corpus import unigram_entropy

    uniform = [np.arange(64, dtype=np.uint16)]
    assert unigram_entropy(uniform, uniform, 64) == pytest.approx(np.log(64))


def test_resumed_run_equals_an_unbroken_one(tmp_path, documents):
    from tiny_lm.corpus import held_out_batches

    held = held_out_batches(documents, batch=4, seqlen=16)
    whole = make_run(tmp_path / "whole")
    assert whole.train(documents, held)

    first = make_run(tmp_path / "parts")
    step = first._one_step

    def interrupted(ids):
        if first.step == 2:
            signal_number = 2
            first._ask_to_stop(signal_number, None)
        return step(ids)

    first._one_step = interrupted
    assert not first.train(documents, held) and first.step == 3
    second = make_run(tmp_path / "parts")
    second.load()
    assert second.train(documents, held)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss(tmp_path, documents):
    from tiny_lm.train import evaluate

    run = make_run(tmp_path, steps=60)
    data = [torch.from_numpy(np.concatenate(documents)[:340].astype(np.int64)).view(20, 17)]
    before = evaluate(run.model, data)
    run.train(documents, data)
    assert evaluate(run.model, data) < before - 0.5


def test_schedule_warms_up_and_ends_near_zero():
    from tiny_lm.train import Settings, schedule

    s = Settings(steps=100, warmup=10, decay=0.5)
    assert schedule(0, s) == 0.1 and schedule(9, s) == 1.0 and schedule(50, s) == 1.0
    assert schedule(75, s) == 0.5 and 0 < schedule(99, s) <= 0.02


@pytest.fixture
def main(monkeypatch):
    """The command in this process, on three modules in place of the whole library."""
    import train_tiny_lm

    texts = {"train": ["argparse", "random"], "heldout": ["heapq"]}
    monkeypatch.setattr(
        train_tiny_lm,
        "stdlib_text",
        lambda split: [(n, t) for n, t in stdlib_text(split) if n in texts[split]],
    )

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train_tiny_lm.py", *map(str, args)])
        return train_tiny_lm.main()

    return run


def test_the_command_writes_a_model(tmp_path, main, capsys):
    out = tmp_path / "out"
    size = ("--layers", 1, "--batch", 1, "--seqlen", 64, "--device", "cpu")
    assert main("--out", out, "--steps", 2, *size) == 0
    assert "held-out loss" in capsys.readouterr().out
    record = json.loads((out / "model" / "training.json").read_text())
    assert record["step"] == 2 and record["heldout_loss"] < 9
    assert len(ElementTree.parse(out / "model" / "loss.svg").getroot()) > 5
    with pytest.raises(SystemExit):
        main("--out", out, "--steps", 3, *size)
    assert "--resume" in capsys.readouterr().err
    assert main("--out", out, "--steps", 3, "--resume", "--layers", 2) == 2
    assert "--layers" in capsys.readouterr().err
    assert main("--out", out, "--steps", 3, "--resume", *size) == 0
    assert json.loads((out / "model" / "training.json").read_text())["step"] == 3


@pytest.mark.parametrize("args, word", [(("--steps", 0), "--steps"),
                                        (("--resume",), "checkpoint.pt"),
                                        (("--seqlen", 4096), "--seqlen")])  # fmt: skip
def test_bad_arguments(tmp_path, main, capsys, args, word):
    with pytest.raises(SystemExit) as stopped:
        main("--out", tmp_path / "out", *args)
    assert stopped.value.code == 2 and word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
