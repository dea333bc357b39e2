"""The embedded model against transformers, and the text it was trained on."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from genai_perf.models import CALIBRATION, HELD_OUT, stdlib_text, tiny_python_lm

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = tiny_python_lm()
RECORD = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(tokenizer):
    """512 tokens from the middle of each of up to 24 held-out files, and the bytes they predict."""
    found, size = [], 0
    for _, text in stdlib_text("heldout"):
        ids = tokenizer(text)["input_ids"][600 : 600 + 512]
        if len(ids) == 512 and len(found) < 24:
            found.append(ids)
            size += len(tokenizer.decode(ids[1:]).encode())
    return torch.tensor(found), size


def top(name: str) -> str:
    return name.split(".")[0]


def test_splits_are_apart():
    train, held = stdlib_text("train"), stdlib_text("heldout")
    assert {top(name) for name, _ in held} == set(HELD_OUT)
    assert not {top(name) for name, _ in train} & set(HELD_OUT)
    assert not {text for _, text in train} & {text for _, text in held}
    share = sum(len(t) for _, t in held) / sum(len(t) for _, t in train + held)
    assert 0.03 < share < 0.10


def test_calibration_is_training_text():
    calibration = stdlib_text("calibration")
    assert {top(name) for name, _ in calibration} == set(CALIBRATION)
    assert set(calibration) <= set(stdlib_text("train"))


def test_text_is_the_library_alone():
    names = [name for name, _ in stdlib_text("train")]
    assert names == sorted(set(names)) and {"os", "argparse", "asyncio.events"} <= set(names)
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "ensurepip", "torch", "pip"}
    assert not any(name.startswith(("encodings", "_sysconfigdata")) for name in names)


def test_unknown_split():
    with pytest.raises(ValueError, match="split must be one of 'train', 'heldout'.*'validation'"):
        stdlib_text("validation")


def test_files_fit_the_package():
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 13_000_000
    assert (FOLDER / "MODEL_CARD.md").exists()


def test_weights_are_finite_fp16_and_tied():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert "lm_head.weight" not in names
        for name in names:
            value = file.get_tensor(name)
            assert value.dtype == torch.float16 and value.isfinite().all(), name


def test_architecture(model):
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 6_000_000
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (256, 64, 4096)
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.intermediate_size % 128 == 0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tokenizer_gives_the_text_back(tokenizer):
    assert len(tokenizer) == 4096
    samples = [text for _, text in stdlib_text("heldout")][::7]
    for text in [*samples, "", "\t\r\n  x = '\u00e9\u4f60\U0001f40d'  \n\n", "\x00\x7f  "]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 0
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_indent_is_one_token(tokenizer):
    assert len(tokenizer.tokenize("\n        return")) == 2


@torch.no_grad()
def test_held_out_loss(model, windows):
    """RECORD has the loss on all of the held-out text. These 24 windows give 2.91 with the text of
    Python 3.11, 2.95 with 3.12 and 2.98 with 3.13."""
    ids, size = windows
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss <= 3.15
    assert loss * ids[:, 1:].numel() / size / math.log(2) <= 1.3  # bits per byte
    assert RECORD["heldout_loss"] <= 3.4 and RECORD["unigram_entropy"] >= 6.4


@torch.no_grad()
def test_own_module_gives_the_logits_of_transformers(model, windows, monkeypatch):
    """examples/tiny_lm/model.py, with genai_perf.attention, on the shipped weights."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_lm.model import Config, TinyLM

    own = TinyLM(Config(layers=model.config.num_hidden_layers)).eval()
    own.load_state_dict({k.removeprefix("model."): v for k, v in model.state_dict().items()
                         if k != "lm_head.weight"})  # fmt: skip
    ids = windows[0][:4]
    want, got = model(ids).logits, own(ids)
    judge = model.double()(ids).logits
    model.float()
    assert (got - judge).abs().max() <= 2 * (want - judge).abs().max() + 1e-5


def test_record_is_of_a_finished_run():
    assert RECORD["finished"] and RECORD["step"] == RECORD["settings"]["steps"]
    steps = [entry["step"] for entry in RECORD["curve"]]
    assert steps == sorted(steps) and steps[-1] == RECORD["step"]
    assert RECORD["attention"] == "genai_perf"
    first, last = RECORD["curve"][0]["train_loss"], RECORD["curve"][-1]["train_loss"]
    assert last < first / 1.8


def test_nothing_names_the_machine_it_came_from():
    for file in FOLDER.iterdir():
        if file.suffix in (".json", ".md") and file.name != "tokenizer.json":
            text = file.read_text()
            assert "/tmp" not in text and "/root" not in text and sys.prefix not in text, file.name
