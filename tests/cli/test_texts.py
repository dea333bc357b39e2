"""Which text calibrates and which measures."""

import json

import pytest

from genai_perf import CalibrationError
from genai_perf.cli.texts import demo_texts


def test_the_standard_library_by_default():
    known, measured = demo_texts(None, None, embedded=True)
    assert not set(known.documents) & set(measured.documents)
    assert "standard library" in known.source
    assert "neither training nor calibration saw" in measured.source
    other = demo_texts(None, None, embedded=False)[1]
    assert "training" not in other.source  # nobody knows what another model was trained on


def test_a_calibration_file_keeps_its_last_fifth_for_measuring(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(10)))
    known, measured = demo_texts(file, None, embedded=False)
    assert known.documents == tuple(f"text {i}" for i in range(8))
    assert measured.documents == ("text 8", "text 9")
    assert measured.source == "the last fifth of texts.jsonl, kept from calibration"


def test_one_text_is_split_between_lines(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i}\n" for i in range(20)))
    known, measured = demo_texts(file, None, embedded=False)
    assert known.documents[0] + measured.documents[0] == file.read_text()
    assert measured.documents[0].startswith("line 16\n")


def test_an_evaluation_file_leaves_calibration_whole(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    known, measured = demo_texts(tmp_path / "a.txt", tmp_path / "b.txt", embedded=True)
    assert (known.documents, known.source) == (("a.txt",), "a.txt")
    assert (measured.documents, measured.source) == (("b.txt",), "b.txt")


def test_bad_files(tmp_path):
    with pytest.raises(CalibrationError, match="no.txt"):
        demo_texts(tmp_path / "no.txt", None, embedded=True)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="empty.txt"):
        demo_texts(None, tmp_path / "empty.txt", embedded=True)
