"""What the machine says about itself."""

import json
import subprocess

import pytest

from genai_perf.bench.machine import commit, machine, versions


def test_machine_is_json_and_plausible():
    found = machine().to_dict()
    json.dumps(found, allow_nan=False)
    assert found["cores_usable"] >= 1
    assert found["memory_bytes"] > found["memory_available_bytes"] > 0
    assert found["cpu"]
    assert str(machine()).startswith(found["cpu"])


def test_versions_name_what_is_missing(monkeypatch):
    monkeypatch.setattr("genai_perf.bench.machine._PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["torch"].startswith("2.")
    assert found["no-such-package"] is None


def git(root, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)


def test_commit_says_whether_the_tree_differs(tmp_path):
    if subprocess.run(["git", "--version"], capture_output=True).returncode:
        pytest.skip("no git here")
    assert commit(tmp_path) is None
    git(tmp_path, "init")
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    clean = commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == clean + "+"
