"""One layer in every format: the numbers, and that a wrong result is never timed."""

import torch

from genai_perf.bench import layer


class Clock:
    """Advances by one second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def small(**options):
    return layer.time_layer(
        ("int8", "fp8", "nf4", "int4"), in_features=128, out_features=96, rows=(1, 3), rounds=4,
        clock=Clock(), **options,
    )  # fmt: skip


def test_every_format_at_every_number_of_rows():
    steps = []
    found = small(on_round=steps.append)
    assert [(r["name"], r["rows"]) for r in found["rows"]] == [
        (name, rows) for rows in (1, 3) for name in ("dense", "int8", "fp8", "nf4", "int4")
    ]
    assert found["failed"] == []
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    sizes = {r["name"]: r["weight_bytes"] for r in found["rows"]}
    assert sizes["dense"] == 96 * 128 * 4
    assert sizes["int8"] == 96 * 128 + 96 * 4
    assert sizes["int4"] == 96 * 64 + 96 * 4
    assert all(r["error"] < 1e-5 for r in found["rows"])
    assert all(r["time_ratio"]["ratio"] == 1 for r in found["rows"])  # the clock knows no speed


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    right = layer.quant_matmul

    def wrong(x, qweight):
        out = right(x, qweight)
        return out + 1e-3 * out.abs().max() if qweight.format == "nf4" else out

    monkeypatch.setattr(layer, "quant_matmul", wrong)
    found = small()
    assert "nf4" not in {r["name"] for r in found["rows"]}
    assert [(f["name"], f["rows"]) for f in found["failed"]] == [("nf4", 1), ("nf4", 3)]
    assert "allowed" in found["failed"][0]["reason"]


def test_a_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(layer, "quant_matmul", lambda x, q: torch.full((len(x), 96), torch.nan))
    assert len(small()["failed"]) == 8
