"""The guards can fail, and fresh memory is poisoned inside them only."""

import pytest
import torch

from genai_perf.testing.memory import far_apart, guarded


def test_a_write_past_the_end_is_seen():
    with pytest.raises(AssertionError, match="outside of its output"), guarded():
        x = torch.zeros(1).new_empty(4)
        x.as_strided((5,), (1,)).zero_()
    with guarded():
        torch.empty(4).zero_()


def test_fresh_memory_is_nan():
    with guarded():
        x = torch.empty(3, 5, dtype=torch.bfloat16)
        y = torch.empty_like(torch.zeros(4, 3).t())
        assert x.isnan().all() and y.isnan().all() and y.stride() == (1, 3)
        assert torch.empty(2, dtype=torch.int32).eq(-1).all() and torch.empty(0).shape == (0,)


def test_far_apart():
    x = torch.randn(3, 2, 4)
    far = far_apart(x, 1000)
    assert torch.equal(far, x) and far[2].data_ptr() - far[0].data_ptr() >= 4000
