"""Labels that do not overlap, ticks, and drawings that are well-formed XML."""

import math
import random
import xml.etree.ElementTree as ET

import pytest

from genai_perf.bench.plots import Box, Point, place_labels, scatter, ticks

NAMES = ["dense", "int8-rtn", "fp8-rtn", "nf4-rtn", "int4-rtn", "int4-gptq", "sparsegpt-0.5",
         "sparsegpt-2:4", "sparsegpt-0.5+int4-gptq"]  # fmt: skip


@pytest.mark.parametrize("frame", [Box(50, 12, 870, 374), Box(50, 12, 332, 354)])
@pytest.mark.parametrize("seed", range(8))
def test_labels_overlap_neither_labels_nor_markers_nor_the_frame(frame, seed):
    """Nine variants in few clusters, as they come: sizes coincide and perplexities are close."""
    rng = random.Random(seed)
    centres = [(rng.uniform(0.2, 0.95), rng.uniform(0.1, 0.9)) for _ in range(4)]
    anchors = []
    for i in range(len(NAMES)):
        u, v = centres[i % 4]
        x = frame.left + (u + rng.uniform(-0.01, 0.01)) * (frame.right - frame.left)
        y = frame.top + (v + rng.uniform(-0.04, 0.04)) * (frame.bottom - frame.top)
        anchors.append((min(x, frame.right - 8), min(max(y, frame.top + 8), frame.bottom - 8)))
    boxes = place_labels(anchors, NAMES, frame, 13)
    for i, box in enumerate(boxes):
        assert box.outside(frame) < 1e-6
        assert not any(box.overlap(other) for other in boxes[i + 1 :])
        assert not any(box.overlap(Box(x - 6, y - 6, x + 6, y + 6)) for x, y in anchors)


def test_ticks_are_round_and_inside():
    assert ticks(0, 8.7, 4) == [0, 2.5, 5, 7.5]
    assert ticks(27.1, 35.9, 5) == [28, 30, 32, 34]
    assert ticks(3, 3, 5) == [3]
    for low, high in ((0, 1e-3), (-5, 7), (1e6, 3e9)):
        found = ticks(low, high, 5)
        assert 3 <= len(found) <= 6
        assert all(low <= t <= high for t in found)


def draw(points):
    svg = scatter(points, width=880, height=420, x_title="size & more", y_title="perplexity",
                  description='a "plot" <of> points')  # fmt: skip
    return ET.fromstring(svg)


def test_every_point_is_drawn_and_named():
    points = [Point(name, 8 - i % 4, 28 + i, "dense" if i == 0 else "four")
              for i, name in enumerate(NAMES)]  # fmt: skip
    svg = draw(points)
    texts = [node.text for node in svg.iter() if node.tag.endswith("text")]
    assert set(NAMES) <= set(texts)
    marks = [node for node in svg.iter() if "mark" in node.get("class", "").split()]
    assert len(marks) == len(NAMES)
    assert svg.get("aria-label") == 'a "plot" <of> points'


def test_a_wide_range_is_logarithmic():
    svg = draw([Point("dense", 1, 20.0, "dense"), Point("bad", 0.5, 90000.0, "sparse")])
    texts = [node.text for node in svg.iter() if node.tag.endswith("text")]
    assert "perplexity, log scale" in texts
    assert {"100", "1000", "10000"} <= set(texts)


def test_one_point_alone():
    svg = draw([Point("dense", 1.0, 5.0, "dense")])
    numbers = [float(node.get("cx")) for node in svg.iter() if node.get("cx")]
    assert numbers and all(math.isfinite(n) for n in numbers)
