"""Drop-in modules."""

from .experts import QuantizedStack
from .fp8_training import Fp8Linear, train_in_fp8
from .linear import QuantConfig, QuantizedWeight, QuantLinear, shardable
from .model import QuantizationRecord, quantize_model
from .multihead import MultiheadAttention
from .selfattention import GroupedQueryAttention
from .sparse import SparseLinear

__all__ = [
    "Fp8Linear",
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
    "train_in_fp8",
]
