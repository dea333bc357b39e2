"""Quantization formats: data, layouts and exact reference codecs, in torch alone."""

from types import MappingProxyType

from .._checks import check_choice
from .base import Format, QuantizedTensor, Spec
from .code_book import CodeBook
from .dynamic8 import DYNAMIC8
from .fp4 import FORMAT as FP4
from .fp8 import FP8, FP8_240, FP8_E3M4, FP8_E5M2
from .int4 import INT2, INT3, INT4, IntGroups
from .int8 import INT8
from .nf4 import FORMAT as NF4
from .sparse_tensor import SparseTensor

_ALL = (INT8, FP8, FP8_E5M2, FP8_240, FP8_E3M4, NF4, FP4, INT4, INT3, INT2, DYNAMIC8)
FORMATS = MappingProxyType({f.name: f for f in _ALL})

__all__ = [
    "FORMATS",
    "NF4",
    "CodeBook",
    "Format",
    "IntGroups",
    "QuantizedTensor",
    "SparseTensor",
    "Spec",
    "get",
]


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: no such format.
    """
    check_choice("quantize", "format", name, tuple(FORMATS))
    return FORMATS[name]
