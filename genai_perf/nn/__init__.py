"""Drop-in modules."""

from .linear import QuantConfig, QuantizedWeight, QuantLinear
from .model import QuantizationRecord, quantize_model
from .multihead import MultiheadAttention
from .selfattention import GroupedQueryAttention

__all__ = [
    "GroupedQueryAttention",
    "MultiheadAttention",
    "QuantConfig",
    "QuantLinear",
    "QuantizationRecord",
    "QuantizedWeight",
    "quantize_model",
]
