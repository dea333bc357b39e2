"""What the documents say is true: snippets run, tables are current, the version agrees."""

import re
import subprocess
import sys
from pathlib import Path

import genai_perf as gp

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(marker: str) -> str:
    return re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", README, re.S).group(1).strip()


def test_readme_snippets_run_in_order(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "attention_fwd: native" in done.stdout
    assert (tmp_path / "tiny-int4" / "report.json").exists()


def test_support_matrix_is_current():
    out = subprocess.run(
        [sys.executable, "-m", "genai_perf", "doctor", "--support-matrix"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert between("support-matrix") == out.strip()


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_changelog_heads_with_the_version():
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert heading == gp.__version__
