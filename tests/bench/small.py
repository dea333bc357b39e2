"""Cases small enough to run in a test, in the place of the suites' own."""

from dataclasses import replace

import pytest

from genai_perf.bench.suites import suite

FIELDS = {
    "attention": {"seqlen_q": 48, "seqlen_k": 48, "nheads": 4, "nheads_k": 4, "headdim": 16},
    "quant_matmul": {"n": 128, "k": 256},
    "quantize": {"shape": (32, 256)},
    "decode_attention": {"lengths": (130,), "nheads": 4, "nheads_k": 2},
    "sparse_matmul": {"n": 128, "k": 256},
    "distill_loss": {"rows": 20, "vocab": 300, "hidden": 16},
    "optimizer_step": {"shape": (64, 80)},
}


def shrink(patch: pytest.MonkeyPatch, op: str) -> dict:
    """The suite's headline cases, small; everything that asks the suite for cases gets these."""
    room = suite(op)
    all_cases = room.cases()
    found = {name: replace(all_cases[name], **FIELDS[op]) for name in room.HEADLINE}
    patch.setattr(room, "cases", lambda: found)
    return found
