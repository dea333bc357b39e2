"""quantize and dequantize: dense tensors to QuantizedTensor and back."""

from .api import check_search, dequantize, quantize, quantize_like

__all__ = ["check_search", "dequantize", "quantize", "quantize_like"]
