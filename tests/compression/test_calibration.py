import json

import pytest
import torch
from torch import nn

from genai_perf import CalibrationError
from genai_perf.compression.calibration import read_texts, windows
from genai_perf.compression.capture import inputs_of


@pytest.mark.parametrize("name, content, texts", [
    ("a.txt", "Grüße\n\nzwei", ["Grüße\n\nzwei"]),
    ("a.md", "\ufefftext with a mark", ["text with a mark"]),
    ("a.jsonl", '{"text": "one", "id": 1}\n\n"two"\n', ["one", "two"]),
    ("a.json", '["one", {"text": "two"}]', ["one", "two"]),
])  # fmt: skip
def test_read(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content, "utf-8")
    assert read_texts(tmp_path / name) == texts == read_texts(str(tmp_path / name))


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "is empty"),
    ("a.txt", b" \n\t", "is empty"),
    ("a.jsonl", b"", "is empty"),
    ("a.json", b"", "is empty"),
    ("a.json", b"[]", "is empty"),
    ("a.txt", b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8 text"),
    ("a.txt", b"abc\x00def", "holds a zero byte"),
    ("a.jsonl", b'{"text": "a"}\n{"content": "b"}', "line 2 must be a string or an object"),
    ("a.jsonl", b'{"text": 3}', "line 1 must be"),
    ("a.jsonl", b"{'text': 1}", "line 1 is not JSON"),
    ("a.json", b'{"text": "a"}', "must hold a JSON list of texts, got dict"),
    ("a.json", b'["a", 1]', "entry 1 must be"),
    ("missing.txt", None, "No such file"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"calibration file .*{name}: .*{words}"):
        read_texts(tmp_path / name)


def cut(texts, **changed):
    options = {"max_seqlen": 4, "n_samples": 100, "vocab_size": 256} | changed
    return windows(texts, lambda text: list(text.encode()), **options)


def test_windows_are_the_text_in_order_without_padding():
    assert bytes(cut(["abcdef", "ghijk"]).flatten().tolist()) == b"abcdefgh"


def test_fewer_windows_are_drawn_by_seed():
    text = [bytes(range(128)).decode()]

    def starts(seed):
        return cut(text, n_samples=8, seed=seed)[:, 0].tolist()

    assert starts(0) == starts(0) == sorted(starts(0))
    assert len(set(starts(0))) == 8 and starts(0) != starts(1)


@pytest.mark.parametrize("texts, changed, words", [
    (["abc"], {}, "has 3 tokens, fewer than one window of max_seqlen=4"),
    (["abcd\u00e9"], {"vocab_size": 195}, "gave token 195, the model's vocabulary has 195"),
])  # fmt: skip
def test_unusable_text(texts, changed, words):
    with pytest.raises(CalibrationError, match=words):
        cut(texts, **changed)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="max_seqlen must be positive, got 0"):
        cut(["abcd"], max_seqlen=0)


class Attention(nn.Module):
    """q and k share an input, `out` has its own, `late` is called on the second batch only."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out, self.late = (nn.Linear(8, 8) for _ in range(4))
        self.batches = 0

    def forward(self, x):
        self.batches += 1
        y = self.out(self.q(x) + self.k(x))
        return self.late(x) if self.batches > 1 else y


def test_layers_with_one_input_share_one_hessian():
    model = Attention()
    linears = {name: getattr(model, name) for name in ("q", "k", "out", "late")}
    batches = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    with inputs_of(linears) as found:
        for batch in batches:
            model(batch)
    rows = torch.cat([b.reshape(-1, 8) for b in batches])
    assert found["q"] is found["k"]
    torch.testing.assert_close(found["q"].matrix(), 2 * rows.T @ rows / 13)
    assert found["out"].tokens == 13 and found["out"] is not found["q"]
    assert found["late"] is not found["q"] and found["late"].tokens == 3
    model(batches[0])  # the hooks are gone
    assert found["q"].tokens == 13


def test_an_input_shared_at_first_only_is_refused():
    q, k = nn.Linear(4, 4), nn.Linear(4, 4)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(CalibrationError, match="q, k: share their"), inputs_of({"q": q, "k": k}):
        q(x), k(x)
        q(x.clone()), k(y)


def test_entries_of_a_json_file_may_be_long(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["x" * 100_000]))
    assert len(read_texts(tmp_path / "a.json")[0]) == 100_000
