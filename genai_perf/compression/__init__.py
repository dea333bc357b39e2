"""Pruning and quantization: solvers on one layer, recipes, and the engine over a whole checkpoint.

`genai_perf.compress` is the call that goes from folder to folder.
"""

from .recipe import Recipe
from .report import LayerReport, Report
from .steps import AWQ, GPTQ, RIA, RTN, Hadamard, Magnitude, SmoothQuant, SparseGPT, Wanda

__all__ = [
    "AWQ", "GPTQ", "Hadamard", "LayerReport", "Magnitude", "RIA", "RTN", "Recipe", "Report",
    "SmoothQuant", "SparseGPT", "Wanda",
]  # fmt: skip
