"""Drop-in modules."""

from .experts import QuantizedStack
from .linear import QuantConfig, QuantizedWeight, QuantLinear, shardable
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
    "QuantizedStack",
    "QuantizedWeight",
    "SparseLinear",
    "quantize_model",
    "shardable",
]
