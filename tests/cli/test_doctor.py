"""genaiperf doctor and the support matrix."""

import json

import pytest
import torch
from typer.testing import CliRunner

from genai_perf._backends import native
from genai_perf.cli import app, doctor
from genai_perf.ops import OPS


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_json_is_what_examine_found(found):
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    printed = json.loads(done.output)
    assert printed.keys() == found.keys()
    assert printed["calls"] == found["calls"]


def test_every_op_is_asked(found):
    assert {call["call"].split(",")[0] for call in found["calls"]} >= set(OPS)
    assert all(call["backend"] in call["reasons"] for call in found["calls"])
    assert all(call["reasons"][call["backend"]] is None for call in found["calls"])


def test_native_runs_on_this_cpu(found):
    if native.unavailable():
        pytest.skip(native.unavailable())
    on_cpu = {call["call"]: call["backend"] for call in found["calls"] if call["device"] == "cpu"}
    assert set(on_cpu.values()) == {"native"}
    assert found["machine"]["isa"] in ("scalar", "avx2", "avx512")


def test_without_the_extension_the_reason_is_given(monkeypatch):
    reason = "the native extension is not built (for this test)"
    monkeypatch.setattr(native, "_load", lambda: (None, reason))
    found = doctor.examine()
    assert found["backends"]["native"] == reason
    on_cpu = [call for call in found["calls"] if call["device"] == "cpu"]
    assert {call["backend"] for call in on_cpu} == {"reference"}
    assert {call["reasons"]["native"] for call in on_cpu} == {reason}


def test_the_page_for_people():
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for word in ("processor", "memory", "nvcc", "Backends", "quant_matmul", torch.__version__):
        assert word in done.output


def test_the_matrix_has_a_row_for_each_registered_backend():
    rows = doctor.support_markdown().splitlines()[2:]
    cells = [tuple(cell.strip() for cell in row.strip("|").split("|"))[:2] for row in rows]
    assert cells == [(op, b) for op, names in doctor.registry().items() for b in names]
    assert {op for op, _ in cells} >= {"attention_fwd", "attention_bwd", "quantize", "quant_matmul"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries["attention_fwd"].pop("native"), r"lacks \[attention_fwd.native\]"),
        (lambda entries: entries.update(other={"cuda": {}}), r"has \[other.cuda\] that is not"),
    ],
)
def test_a_matrix_that_disagrees_with_the_registry_is_refused(change, message, monkeypatch):
    entries = doctor.support()
    change(entries)
    monkeypatch.setattr(doctor, "support", lambda: entries)
    with pytest.raises(ValueError, match=message):
        doctor.support_markdown()
