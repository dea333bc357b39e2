"""The page: self-contained, complete, accessible."""

import re
from html.parser import HTMLParser

import pytest

from genai_perf.bench.numbers import figures, human_bytes, percent
from genai_perf.bench.report_html import family, render

from .sample_report import VARIANTS, sample_report

VOID = {"meta", "circle", "rect", "path", "line", "br", "wbr", "link"}


class Page(HTMLParser):
    """Tags with attributes and text; fails on a tag that is closed out of order."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def source():
    return render(sample_report())


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_nothing_outside_of_the_page_is_named(source, page):
    """Addresses stand only in xmlns, which is a name and is never fetched."""
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg\")", source)
    assert "//" not in re.sub(r'xmlns="[^"]*"', "", source).replace("<!--", "")
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    assert not re.findall(r"@import|url\(", source)
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset"} & set(attributes)


def test_well_formed(page):
    assert page.open == []


def test_every_variant_stands_in_table_and_both_plots(source):
    for name in VARIANTS:
        assert source.count(f">{name}</text>") == 2
        assert f"</span>{name}</th>" in source


def test_the_numbers_of_the_table(source):
    row = source[source.index("</span>int4-gptq</th>") :]
    cells = re.findall(r"<td>(.*?)</td>", row)[:8]
    assert cells == ["3.85 MB", "2.11", "29.60", "+6.1 %", "3,750", "120", "314 MB", "33.9 MB"]


def test_accessible(page):
    assert ("html", {"lang": "en"}) in page.tags
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in drawings)
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(t == "table" for t, _ in page.tags)
    assert all(a.get("scope") in ("row", "col") for tag, a in page.tags if tag == "th")
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(a["aria-labelledby"] in ids for _, a in page.tags if "aria-labelledby" in a)


def test_phone_and_dark(source):
    assert 'name="viewport" content="width=device-width' in source
    assert "prefers-color-scheme: dark" in source
    assert "max-width: 700px" in source


def test_text_from_outside_is_escaped():
    report = sample_report()
    report["model"]["name"] = "<script>alert(1)</script>"
    report["variants"][1]["notes"] = ["<b>&"]
    source = render(report)
    assert "<script>" not in source
    assert "&lt;b&gt;&amp;" in source


def test_a_variant_that_diverged():
    report = sample_report()
    report["variants"][6] |= {"perplexity": None, "nll": None}
    source = render(report)
    assert "not finite" in source
    assert source.count(">sparsegpt-0.5</text>") == 0
    Page(source)


def test_dense_alone():
    report = sample_report()
    report["variants"] = report["variants"][:1]
    report["layer"]["rows"] = []
    Page(render(report))


def test_families():
    assert [family(n) for n in VARIANTS] == ["dense", "eight", "eight", "four", "four", "four",
                                             "sparse", "sparse", "both"]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,230"), (0.012345, "0.0123"), (1.0, "1.00"), (99.96, "100"),
     (-2.5, "-2.50"), (None, "not finite"), (0.9999, "1.00"), (12345678, "12,300,000")],
)  # fmt: skip
def test_figures(value, text):
    assert figures(value) == text


def test_units():
    assert human_bytes(999) == "999 B"
    assert human_bytes(999_600) == "1.00 MB"
    assert human_bytes(8_130_560) == "8.13 MB"
    assert human_bytes(7.2e12) == "7.20 TB"
    assert percent(1.0316) == "+3.2 %"
    assert percent(0.9998) == "-0.02 %"
