"""quantize and dequantize: dense tensors to QuantizedTensor and back."""

from .api import dequantize, quantize, quantize_like

__all__ = ["dequantize", "quantize", "quantize_like"]
