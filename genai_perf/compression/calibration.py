"""Calibration text: read from a file, cut into windows of tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._checks import check_positive
from .._errors import CalibrationError


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: .jsonl (one {"text": ...} or string a line), .json (a list of them), or
    any other name as one plain text.

    Raises:
        CalibrationError: the file cannot be read, is empty, is not UTF-8 text, or has an entry
            without text; names the file and the line or entry.
    """
    path = Path(path)
    try:
        content = path.read_text("utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"calibration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {path}: is not UTF-8 text") from error
    if "\0" in content:
        raise CalibrationError(f"calibration file {path}: is not text: it holds a zero byte")
    if path.suffix == ".jsonl":
        lines = enumerate(content.splitlines(), 1)
        texts = [_text(_parse(line, path, f"line {n}"), path, f"line {n}")
                 for n, line in lines if line.strip()]  # fmt: skip
    elif path.suffix == ".json":
        entries = _parse(content, path, "content") if content.strip() else []
        if not isinstance(entries, list):
            raise CalibrationError(f"calibration file {path}: must hold a JSON list of texts, "
                                   f"got {type(entries).__name__}")  # fmt: skip
        texts = [_text(entry, path, f"entry {n}") for n, entry in enumerate(entries)]
    else:
        texts = [content]
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"calibration file {path}: is empty")
    return texts


def _parse(content: str, path: Path, place: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"calibration file {path}: {place} is not JSON: {error}") from error


def _text(entry: object, path: Path, place: str) -> str:
    if isinstance(entry, dict):
        entry = entry.get("text")
    if not isinstance(entry, str):
        raise CalibrationError(f"calibration file {path}: {place} must be a string or an object "
                               f"with a string under 'text'")  # fmt: skip
    return entry


def windows(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    max_seqlen: int,
    n_samples: int,
    vocab_size: int,
    seed: int = 0,
) -> torch.Tensor:
    """Token windows: all texts joined, cut every max_seqlen tokens, n_samples of them at random.

    There is no padding: the tokens after the last whole window are left out.

    Args:
        texts: joined in order; a tokenizer that marks where a text begins does so for each.
        encode: text -> token ids.
        max_seqlen: tokens in a window.
        n_samples: windows to take; all where there are fewer.
        vocab_size: ids must be below it.
        seed: of the choice.

    Returns:
        Tensor: int64 (windows, max_seqlen), in the order of the text.

    Raises:
        CalibrationError: less than one window of text, or tokens the model does not know.
    """
    check_positive("calibration", max_seqlen=max_seqlen, n_samples=n_samples)
    tokens = [token for text in texts for token in encode(text)]
    if len(tokens) < max_seqlen:
        raise CalibrationError(f"calibration: the text has {len(tokens)} tokens, fewer than one "
                               f"window of max_seqlen={max_seqlen}; give more text or a smaller "
                               f"max_seqlen")  # fmt: skip
    if max(tokens) >= vocab_size:
        raise CalibrationError(
            f"calibration: the tokenizer gave token {max(tokens)}, the model's vocabulary has "
            f"{vocab_size}: they do not belong together"
        )
    count = len(tokens) // max_seqlen
    cut = torch.tensor(tokens[: count * max_seqlen], dtype=torch.int64).view(count, max_seqlen)
    if count <= n_samples:
        return cut
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n_samples]
    return cut[chosen.sort().values]
