"""int8 against bitsandbytes' vector-wise quantizer and float64."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_perf.formats import int8


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(-35, 38), st.sampled_from(["float32", "float16"]))
def test_equals_bitsandbytes(seed, exponent, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 90)) * 10.0 ** min(exponent, 38.0 if dtype == "float32" else 4.0)
    limit = 3e38 if dtype == "float32" else 6e4
    x = torch.from_numpy(np.clip(x, -limit, limit).astype(dtype))
    if (x.abs().amax(1) == 0).any():
        return  # bitsandbytes divides by 0
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.clone())
    assert bnb is not None
    qt = int8.quantize(x)
    assert torch.equal(qt.qdata, codes)
    assert torch.equal(qt.scale[:, 0], absmax / 127)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(hnp.arrays("float32", (2, 40),
                  elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))  # fmt: skip
def test_error_is_at_most_half_a_step(array):
    x = torch.from_numpy(array.copy())
    qt = int8.quantize(x)
    step = x.double().abs().amax(1, keepdim=True) / 127
    error = (qt.qdata.double() * step - x.double()).abs()
    # Half a step, and the rounding of the factor, of up to 127 steps.
    assert (error <= step * (0.5 + 127 * 2.0**-22)).all()


def test_zero_rows_and_tiny_rows():
    x = torch.zeros(3, 8)
    x[1] = torch.arange(8) * 1e-45
    x[2, 3] = -1e-38
    qt = int8.quantize(x)
    assert qt.scale[0].item() == 0 and not qt.qdata[0].any()
    assert qt.qdata[1, 7] == 127 and qt.qdata[2, 3] == -127
    dense = qt.dequantize()
    assert not dense.isnan().any()
    torch.testing.assert_close(dense[2], x[2], rtol=1e-4, atol=0)


def test_codes_are_symmetric():
    x = torch.randn(8, 100)
    assert torch.equal(int8.quantize(-x).qdata, -int8.quantize(x).qdata)
    assert int8.quantize(x).qdata.min() >= -127
