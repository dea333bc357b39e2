"""genaiperf demo from end to end on a small random model, and how it fails."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from genai_perf.bench import schema, side_by_side
from genai_perf.bench.captions import busy_warning
from genai_perf.bench.evaluate import perplexity
from genai_perf.bench.generation import decode_call, memory_probe, prefill_call
from genai_perf.bench.machine import machine
from genai_perf.bench.side_by_side import RECIPES, Settings, Text, measure
from genai_perf.cli import app
from genai_perf.cli.texts import demo_texts

SMALL = Settings(window=32, eval_windows=4, calibration_windows=8, decode_steps=4, rounds=4,
                 layer_rounds=4, layer_features=128)  # fmt: skip
FEW = ("int8-rtn", "sparsegpt-2:4")


@pytest.fixture(scope="module")
def demo(tiny_checkpoint, text_file, tmp_path_factory):
    """The command as a user runs it, in a process of its own: its folder and what it said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "genai_perf", "demo", "--model", tiny_checkpoint, "--out", out,
         "--calibration", text_file, "--quick", "--keep"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def test_report_json(demo):
    out, _, _ = demo
    report = schema.read(out / "report.json")
    assert [v["name"] for v in report["variants"]] == ["dense", *RECIPES]
    dense = report["variants"][0]
    assert report["model"]["name"] == "tiny-random"
    for variant in report["variants"]:
        assert variant["peak_rss_bytes"] > variant["baseline_rss_bytes"] > 50e6
        assert variant["prefill_tokens_per_s"] > 0 and variant["decode_tokens_per_s"] > 0
        # A model that knows nothing stays near the size of its vocabulary.
        assert 2000 < variant["perplexity"] < 8000
    sizes = {v["name"]: v["bytes_on_disk"] for v in report["variants"]}
    assert sizes["int4-rtn"] < sizes["int8-rtn"] < dense["bytes_on_disk"]
    assert {r["name"] for r in report["layer"]["rows"]} == {"dense", "int8", "fp8", "nf4", "int4"}
    assert report["layer"]["failed"] == []


def test_report_html_and_what_is_printed(demo):
    out, printed, progress = demo
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    for name in ("dense", *RECIPES):
        assert f">{name}</text>" in page
        assert name in printed
    assert str(out / "report.json") in printed.replace("\n", "")
    assert "Perplexity" in progress and "Peak memory" in progress


def test_only_the_named_files_are_left(demo):
    out, _, _ = demo
    assert sorted(p.name for p in out.iterdir()) == ["models", "report.html", "report.json"]
    assert sorted(p.name for p in (out / "models").iterdir()) == sorted(
        name.replace(":", "_") for name in RECIPES
    )


@pytest.mark.parametrize("name", ["dense", "int8-rtn", "sparsegpt-0.5"])
def test_perplexity_agrees_with_transformers(name, demo, tiny_checkpoint, text_file):
    """The same windows through AutoModelForCausalLM, which knows nothing of QuantLinear."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _, _ = demo
    folder = tiny_checkpoint if name == "dense" else out / "models" / name
    report = schema.read(out / "report.json")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    texts = demo_texts(text_file, None, embedded=False)[1].documents
    ids = torch.tensor([token for text in texts for token in tokenizer(text).input_ids])
    count = min(len(ids) // report["settings"]["window"], 10**6)
    cut = ids[: count * report["settings"]["window"]].view(count, -1)
    chosen = cut[torch.linspace(0, count - 1, report["settings"]["eval_windows"]).round().long()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    with torch.inference_mode():
        for window in chosen[:, None]:
            losses.append(model(window, labels=window).loss.item())
    found = next(v for v in report["variants"] if v["name"] == name)
    assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def small(tiny_checkpoint, work, **options):
    work.mkdir()
    calibration, evaluation = demo_texts(None, None, embedded=False)
    short = Text(evaluation.documents[:2], "two modules")
    return measure(tiny_checkpoint, work, calibration=Text(calibration.documents[:2], "two others"),
                   evaluation=short, recipes=FEW, settings=SMALL, **options)  # fmt: skip


def test_measure_says_what_it_did_and_how_far_it_is(tiny_checkpoint, tmp_path):
    steps = []
    report = small(tiny_checkpoint, tmp_path / "work", progress=lambda *step: steps.append(step))
    assert [v["name"] for v in report["variants"]] == ["dense", *FEW]
    assert len(report["variants"][0]["prefill_seconds"]) == 4
    stages = list(dict.fromkeys(stage for stage, _, _ in steps))
    assert stages == ["Compressing", "Perplexity", "Timing prefill", "Timing decode",
                      "Peak memory, fresh processes", "One large layer"]  # fmt: skip
    for stage in stages:
        done = [(d, n) for s, d, n in steps if s == stage]
        assert done == sorted(done) and done[-1][0] == done[-1][1]
    assert "2:4" in json.dumps(report["variants"][2]["recipe"])
    assert report["settings"]["window"] == 32


@pytest.mark.parametrize(("asked", "busy", "used"), [(None, 0.2, 3), (None, 1.6, 1), (None, 9.0, 1),
                                                     (2, 9.0, 2)])  # fmt: skip
def test_busy_cores_are_left_alone(asked, busy, used, tmp_path, monkeypatch):
    host = replace(machine(), cores_busy=busy)
    monkeypatch.setattr(side_by_side, "machine", lambda: host)
    monkeypatch.setattr(
        side_by_side, "_measure", lambda *parts: (parts[-1], torch.get_num_threads())
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        text = Text(("x",), "x")
        recorded, threads = measure(tmp_path, tmp_path, calibration=text, evaluation=text,
                                    settings=replace(SMALL, threads=asked))  # fmt: skip
        assert recorded.torch_threads == threads == used
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert (busy_warning(recorded) is None) == (busy < 0.5)


def test_variants_that_do_not_fit_together_take_turns_with_dense(tiny_checkpoint, monkeypatch):
    loaded = []
    load = side_by_side._load
    monkeypatch.setattr(side_by_side, "_load", lambda path: loaded.append(path) or load(path))
    paths = {name: tiny_checkpoint for name in ("dense", "one", "two")}
    steps = []
    quality, timed = side_by_side._run(paths, torch.arange(64).view(2, 32), False, SMALL,
                                       lambda *step: steps.append(step))  # fmt: skip
    assert list(quality) == list(paths)
    assert quality["dense"].nll == quality["two"].nll
    assert len(loaded) == 3  # dense stays while the others come and go
    for phase in ("prefill", "decode"):
        assert list(timed[phase]) == list(paths)
        assert {(dense.name, own.name) for dense, own in timed[phase].values()} == {
            ("dense", name) for name in paths
        }
        assert ("Timing " + phase, 2 * SMALL.rounds, 2 * SMALL.rounds) in steps


def test_decoding_from_the_cache_is_greedy_generation(tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prompt = torch.arange(3, 19)[None]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 16:]
    call = decode_call(model, prompt, 6)
    assert call()[0].tolist() == expected.tolist()
    assert call()[0].tolist() == expected.tolist()  # the cache was cut back
    assert prefill_call(model, prompt)()[0, -1].argmax() == expected[0]


def test_the_memory_probe_does_the_work(tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    window = list(range(5, 37))
    found = memory_probe(str(tiny_checkpoint), window, 4, torch.get_num_threads())
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    assert found["nll"] == pytest.approx(perplexity(model, torch.tensor([window])).nll, rel=1e-5)
    assert len(found["tokens"]) == 4


def run(*words) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["demo", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


def test_bad_input_is_one_sentence_and_leaves_no_folder(tiny_checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("x = 1\n")
    (tmp_path / "file").write_text("")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_checkpoint / name).read_bytes())
    out = tmp_path / "out"
    for words, expected in (
        (("--model", tmp_path / "nowhere", "--out", out), "nowhere"),
        (("--model", bare, "--out", out), "has no tokenizer"),
        (("--model", tiny_checkpoint, "--out", tmp_path / "file"), "must name a folder"),
        (("--model", tiny_checkpoint, "--out", out, "--evaluation", tmp_path / "no.txt"), "no.txt"),
        (("--model", tiny_checkpoint, "--out", out, "--evaluation", tmp_path / "short.txt"),
         "short.txt) must have at least one window"),
    ):  # fmt: skip
        code, err = run(*words)
        assert code == 2, words
        assert expected in next(s for s in err.splitlines() if s.startswith("error: "))
        assert not out.exists()


def test_an_earlier_report_survives_a_failure(tiny_checkpoint, tmp_path):
    (tmp_path / "report.json").write_text("earlier")
    assert run("--model", tmp_path / "nowhere", "--out", tmp_path)[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "earlier"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_or_kill_leaves_nothing(number, code, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "genai_perf", "demo", "--model", tiny_checkpoint, "--out", out]
    # A shell that starts tests in the background has them ignore Ctrl-C, and that is inherited.
    fresh = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **fresh) as process:
        deadline = time.monotonic() + 120
        while not any(out.rglob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)  # until the first variant is written
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not out.exists()
