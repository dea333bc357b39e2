"""The report's schema: what is refused, and that files are written whole or not at all."""

import copy
import json
import math

import pytest

from genai_perf.bench import schema

from .sample_report import sample_report


def broken(change) -> dict:
    report = copy.deepcopy(sample_report())
    change(report)
    return report


def test_the_sample_is_valid_and_round_trips(tmp_path):
    path = tmp_path / "report.json"
    schema.write(path, sample_report())
    assert schema.read(path) == sample_report()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("machine"), "report.machine is missing"),
        (lambda r: r["variants"][2].pop("perplexity"), r"variants\[2\].perplexity is missing"),
        (
            lambda r: r["variants"][1].update(bytes_on_disk="5 MB"),
            r"bytes_on_disk must be int, got",
        ),
        (
            lambda r: r["variants"][0].update(peak_rss_bytes=True),
            "peak_rss_bytes must be int, got T",
        ),
        (lambda r: r["layer"]["rows"][0]["time_ratio"].pop("low"), "time_ratio.low is missing"),
        (lambda r: r.update(variants={}), "report.variants must be a list, got dict"),
        (lambda r: r["variants"].reverse(), "the first must be 'dense'"),
        (lambda r: r["variants"].append(r["variants"][1]), "names must differ"),
        (lambda r: r.update(schema_version=99), "schema_version must be 2, got 99"),
        (lambda r: r.update(seconds=None), "report.seconds must be int or float, got None"),
    ],
)
def test_each_fault_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        schema.validate(broken(change))


def test_not_an_object():
    with pytest.raises(ValueError, match="report must be an object, got list"):
        schema.validate([])


def test_a_file_cut_in_half_is_named(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(sample_report())[:5000])
    with pytest.raises(ValueError, match="report.json: "):
        schema.read(path)


def test_nothing_is_written_for_a_bad_report(tmp_path):
    path = tmp_path / "report.json"
    schema.write(path, sample_report())
    with pytest.raises(ValueError, match="Out of range float"):
        schema.write(path, broken(lambda r: r["variants"][0].update(nll=math.nan)))
    with pytest.raises(ValueError, match="missing"):
        schema.write(path, broken(lambda r: r.pop("layer")))
    assert schema.read(path) == sample_report()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    schema.write_text(path, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        schema.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
