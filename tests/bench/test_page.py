"""The results page: its parts, and how it looks in a real browser."""

import copy
import csv
import io
from pathlib import Path

import pytest

from genai_perf.bench import page, results

from . import browser
from .sample_report import sample_report
from .test_results import bench_report, variant

# Everything whose boxes must not cover each other, and the overlaps found, by text.
OVERLAPS = """(() => {
  const shown = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 0;
  const boxes = (root, query) => [...root.querySelectorAll(query)].filter(shown).map((e) =>
    [(e.textContent || e.tagName).trim().slice(0, 40), e.getBoundingClientRect()]);
  const sections = [...document.querySelectorAll("section")];
  const groups = [boxes(document, "main > *"), ...sections.map((s) =>
    [...s.children].filter(shown).map((e) => [e.tagName + " " + e.textContent.trim().slice(0, 30),
    e.getBoundingClientRect()])), ...[...document.querySelectorAll("figure svg")].filter(shown)
    .map((s) => boxes(s, "text")), ...[...document.querySelectorAll("table")].map((t) =>
    [...t.querySelectorAll("tr")].filter(shown).map((r) => [r.textContent.trim().slice(0, 30),
    r.getBoundingClientRect()]))];
  const found = [];
  for (const group of groups) for (let i = 0; i < group.length; i++) for (let j = 0; j < i; j++) {
    const [a, p] = group[i], [b, q] = group[j];
    const w = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (w > 2 && h > 2) found.push(a + " | " + b);
  }
  return found;
})()"""
OUTSIDE = """[...document.querySelectorAll("figure svg")].filter((s) => s.checkVisibility())
  .flatMap((s) => { const f = s.getBoundingClientRect();
  return [...s.querySelectorAll("text, path")]
  .filter((e) => { const r = e.getBoundingClientRect(); return r.left < f.left - 1
  || r.right > f.right + 1 || r.top < f.top - 1 || r.bottom > f.bottom + 1; })
  .map((e) => e.textContent || e.getAttribute("class")); })"""
PLOTS = """[...document.querySelectorAll("figure")].map((f) => [...f.querySelectorAll("svg")]
  .filter((s) => s.checkVisibility()).map((s) => s.querySelectorAll(".mark").length))"""


def full_report() -> dict:
    """Several cases, a verdict of each kind, a failed, a skipped and an out-of-memory variant."""
    report = bench_report()
    first = report["rows"][0]
    first["comparisons"] = [comparison("faster", 0.5)]
    rows = [first]
    for i, verdict in enumerate(("slower", "same", "undecided")):
        row = copy.deepcopy(first) | {"case": f"case {i}", "flops": 10 ** (8 + i)}
        row["comparisons"] = [comparison(verdict, (1.4, 1.0, 0.97)[i])]
        rows.append(row)
    for status in ("failed", "skipped", "out of memory"):
        rows[1]["variants"].append(variant(f"peer that is {status}", False, [], status))
    other = copy.deepcopy(first) | {"op": "quant_matmul", "case": "nf4-1x4096x4096-float32"}
    report["rows"] = [*rows, other]
    report["models"] = [
        {"variant": "tiny", "batch": 1, "length": 64, "status": "ok", "reason": None,
         "prefill_tokens_per_s": 2700.0, "decode_tokens_per_s": 300.0, "first_token_seconds": 0.02,
         "train_step_seconds": 0.13, "mfu": 0.4, "peak_bytes": 351 << 20,
         "train_peak_bytes": 450 << 20, "train_reason": None},
        {"variant": "tiny", "batch": 64, "length": 64, "status": "out of memory", "reason": "full"},
    ]  # fmt: skip
    report["training"] = [
        {"name": "plain", "status": "ok", "reason": None, "samples_per_s": 3.2, "loss": 2.9,
         "peak_bytes": 800 << 20, "own_bytes": 300 << 20},
        {"name": "8-bit optimizer", "status": "skipped", "reason": "not installed"},
    ]  # fmt: skip
    return report


def comparison(verdict, ratio):
    return {"baseline": "torch-sdpa", "candidate": "native", "ratio": ratio, "low": 0.98 * ratio,
            "high": 1.02 * ratio, "pairs": 40, "verdict": verdict, "reason": "because"}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    results.write(tmp_path / "first.json", full_report())
    from genai_perf.bench import schema

    schema.write(tmp_path / "demo.json", sample_report())
    return [tmp_path / "first.json", tmp_path / "demo.json"]


def test_page_holds_everything_and_loads_nothing(files, tmp_path):
    page.write(files, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    for words in ("attention", "quant_matmul", "out of memory", "peer that is skipped", "because",
                  "8-bit optimizer", "Roofline", "first.json", "demo.json"):  # fmt: skip
        assert words in text, words
    assert "src=" not in text and "@import" not in text and "url(" not in text
    assert not [part for part in text.split('href="')[1:] if not part.startswith("#")]


def test_text_from_files_is_escaped(tmp_path):
    report = full_report()
    report["rows"][0]["case"] = "<script>alert(1)</script>"
    results.write(tmp_path / "x.json", report)
    assert "<script>alert" not in page.render(page.read([tmp_path / "x.json"]))


def test_csv_and_markdown(files, tmp_path):
    page.write(files, tmp_path / "r.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert list(rows[0]) == list(page.COLUMNS)
    assert (rows[0]["variant"], rows[0]["verdict"], rows[0]["speed"]) == ("native", "faster", "2.0")
    assert sum(row["status"] != "ok" for row in rows) == 3
    page.write(files, tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {8}
    assert any("faster: 2.00 x torch-sdpa" in line for line in table)


def test_png(files, tmp_path):
    page.write(files, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input(files, tmp_path):
    with pytest.raises(ValueError, match="-o must end in .html, .csv, .md, .png, got r.pdf"):
        page.write(files, tmp_path / "r.pdf")
    with pytest.raises(ValueError, match="must differ in name"):
        page.read([files[0], files[0]])
    (tmp_path / "half.json").write_text(files[0].read_text()[:500])
    with pytest.raises(ValueError, match="half.json"):
        page.write([tmp_path / "half.json"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.fixture(scope="module")
def chromium():
    if browser.executable() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is on the path")
    with browser.Browser() as opened:
        yield opened


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(chromium, files, tmp_path, width, height, dark):
    path = tmp_path / "r.html"
    page.write(files, path)
    chromium.open(path, width, height, dark=dark)
    assert chromium.faults() == []
    assert chromium.js("document.documentElement.scrollWidth") <= width
    assert chromium.js(OVERLAPS) == []
    assert chromium.js(OUTSIDE) == []
    plots = chromium.js(PLOTS)
    assert len(plots) == 4  # two rooflines, two of the demo
    assert all(len(svgs) == 1 and svgs[0] > 0 for svgs in plots)
    background = chromium.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(19, 20, 23)" if dark else "rgb(246, 246, 244)")
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_sorting_and_filtering_by_keyboard(chromium, files, tmp_path):
    page.write(files, tmp_path / "r.html")
    chromium.open(tmp_path / "r.html", 1280, 900)
    first = "document.querySelector('#table-attention tbody tr').cells[0].textContent.trim()"
    for _ in range(20):
        chromium.press("Tab")
        if chromium.js("document.activeElement.textContent") == "ms":
            break
    assert chromium.js("document.activeElement.tagName") == "BUTTON"
    assert chromium.js(first) == "c forward"
    column = "[...document.querySelectorAll('#table-attention tbody tr')].map(r => r.cells[2].dataset.value ?? '')"  # noqa: E501
    chromium.press("Enter")
    up = [float(x) for x in chromium.js(column) if x]
    chromium.press("Enter")
    down = [float(x) for x in chromium.js(column) if x]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert (
        chromium.js("document.activeElement.parentNode.getAttribute('aria-sort')") == "descending"
    )
    assert chromium.js(column)[-1] == ""  # what has no time stands last
    chromium.js("""(() => { const i = document.querySelector('#filter-attention');
                i.value = 'slower native'; i.dispatchEvent(new Event('input')); })()""")
    assert chromium.js("document.querySelector('#table-attention-count').textContent") == "1 rows"
    assert chromium.faults() == []


if __name__ == "__main__":  # a look at real files: python -m tests.bench.test_page FILE... OUT.png
    import sys

    *names, out = sys.argv[1:]
    target = Path(out).with_suffix(".html")
    page.write([Path(name) for name in names], target)
    with browser.Browser() as opened:
        for width in (1280, 390):
            opened.open(target, width, 900, dark=width == 390)
            opened.screenshot(Path(out).with_suffix(f".{width}.png"))
