"""Drop-in modules."""

from .linear import QuantConfig, QuantizedWeight, QuantLinear
from .model import QuantizationRecord, quantize_model
from .multihead import MultiheadAttention
from .selfattention import GroupedQueryAttention
from .sparse import SparseLinear

__all__ = [
    "GroupedQueryAttention",
    "MultiheadAttention",
    "QuantConfig",
    "QuantLinear",
    "QuantizationRecord",
    "QuantizedWeight",
    "SparseLinear",
    "quantize_model",
]
