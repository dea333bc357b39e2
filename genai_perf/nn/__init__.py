"""Drop-in modules."""

from .linear import QuantConfig, QuantizedWeight, QuantLinear
from .model import QuantizationRecord, quantize_model

__all__ = ["QuantConfig", "QuantLinear", "QuantizationRecord", "QuantizedWeight", "quantize_model"]
