"""quantize and dequantize: dense tensors to QuantizedTensor and back."""

from .api import dequantize, quantize

__all__ = ["dequantize", "quantize"]
