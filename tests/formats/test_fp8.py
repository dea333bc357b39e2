"""fp8 against ml_dtypes and torch's own casts."""

import ml_dtypes
import numpy as np
import pytest
import torch

import genai_perf as gp
from genai_perf import formats

NUMPY = {"fp8": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2,
         "fp8_e3m4": ml_dtypes.float8_e3m4}  # fmt: skip
NAMES = list(NUMPY)
# native does not quantize e3m4, which torch has no dtype for
BACKENDS = [(name, b) for name in NAMES for b in ("reference", "native")][:-1]


def numpy_values(name):
    return np.arange(256, dtype=np.uint8).view(NUMPY[name]).astype(np.float32)


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_all_codes_decode_as_ml_dtypes_has_them(name, backend):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    qt = formats.get(name).quantize(torch.ones(1, 256))
    qt.qdata, qt.scale = codes.view(qt.qdata.dtype), torch.ones(1, 1)
    # e5m2 has infinities, which no quantizer here writes; they decode as what they are.
    np.testing.assert_array_equal(gp.dequantize(qt, backend=backend)[0].numpy(), numpy_values(name))


def grid(name):
    """Every finite value, every midpoint of neighbours, and the floats next to both."""
    values = numpy_values(name)
    values = np.unique(values[np.isfinite(values)])
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    x = np.concatenate([values, middles.astype(np.float32)])
    return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.inf)])


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_rounding_is_that_of_ml_dtypes(name, backend):
    x, top = grid(name), float(np.abs(numpy_values(name)[np.isfinite(numpy_values(name))]).max())
    x = np.clip(np.append(x, top), -top, top).astype(np.float32)  # absmax = fmax: the scale is 1
    qt = gp.quantize(torch.from_numpy(x)[None], name, backend=backend)
    assert qt.scale.item() == 1.0
    want = x.astype(NUMPY[name]).view(np.uint8)
    np.testing.assert_array_equal(qt.qdata.view(torch.uint8)[0].numpy(), want)
    if name != "fp8_e3m4":
        assert torch.equal(qt.qdata.view(torch.uint8)[0],
                           torch.from_numpy(x).to(qt.qdata.dtype).view(torch.uint8))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_granularities(name):
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-3, 3, 200)[:, None]
    top = formats.get(name).max
    shapes = {"tensor": (1, 1), "row": (200, 1), "block": (2, 3), "group": (200, 3)}
    for granularity, shape in shapes.items():
        qt = formats.get(name).quantize(x, granularity=granularity)
        assert qt.scale.shape == shape
        if granularity == "block":
            absmax = torch.stack([torch.stack([x[r : r + 128, c : c + 128].abs().max()
                                               for c in range(0, 300, 128)])
                                  for r in range(0, 200, 128)])  # fmt: skip
        elif granularity == "group":
            absmax = torch.stack([x[:, c : c + 128].abs().amax(1) for c in range(0, 300, 128)], 1)
        else:
            absmax = x.abs().amax(() if granularity == "tensor" else 1, keepdim=True)
        assert torch.equal(qt.scale, absmax.view(shape) / top)
        assert qt.group_size == {"tensor": 0, "row": -1, "block": 128, "group": -128}[granularity]
        relative = ((qt.dequantize() - x).abs() / absmax.max()).max()
        assert relative < (0.04 if name == "fp8" else 0.07)


def test_experts_have_blocks_of_their_own():
    x = torch.randn(3, 130, 140, generator=torch.Generator().manual_seed(0))
    together = formats.get("fp8").quantize(x, granularity="block")
    assert together.scale.shape == (3, 2, 2)
    for i in range(3):
        alone = formats.get("fp8").quantize(x[i], granularity="block")
        assert torch.equal(together.scale[i], alone.scale)
        assert torch.equal(together.dequantize()[i], alone.dequantize())


def test_compressed_tensors_agrees():
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    args = ct.QuantizationArgs(num_bits=8, type="float", strategy="channel")
    scale, zero = calculate_qparams(x.amin(1, True), x.amax(1, True), args)
    codes = ct_quantize(x, scale, zero, args, dtype=torch.float8_e4m3fn)
    qt = formats.get("fp8").quantize(x)
    assert torch.equal(qt.scale, scale)
    assert torch.equal(qt.qdata.view(torch.uint8), codes.view(torch.uint8))
