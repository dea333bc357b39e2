"""The Triton optimizer step against the reference; run by test_optimizer_step_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

import pytest
import torch

from genai_perf.ops.optimizer_step import adamw_step, cases, lion_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [case for case in cases.CASES if {"smoke", "edge"} & set(case.tags)]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_step_and_state(case):
    inputs = cases.make_inputs(case)
    options = {"lr": 0.01, "weight_decay": 0.1, "block_size": case.block_size or 256}
    step = (lambda **x: adamw_step(step=3, **x)) if case.kind == "adamw" else lion_step
    want = {name: None if x is None else x.clone() for name, x in inputs.items()}
    got = {name: None if x is None else x.clone().to(DEVICE) for name, x in inputs.items()}
    step(**want, **options, backend="reference")
    step(**got, **options, backend="triton")
    for name, x in want.items():
        if x is None:
            continue
        if x.dtype == torch.uint8:
            # The compiler may fuse a product with a sum: a code next to a bound may move by one.
            apart = (got[name].cpu().int() - x.int()).abs()
            assert (apart <= 1).all() and (apart > 0).sum() <= 0.01 * x.numel(), name
        else:
            torch.testing.assert_close(got[name].cpu(), x)
