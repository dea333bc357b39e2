"""Pruning and quantization: solvers on one layer, recipes, and the engine over a whole checkpoint.

`genai_perf.compress` is the call that goes from folder to folder.
"""

from .recipe import GPTQ, RIA, RTN, Magnitude, Recipe, SparseGPT, Wanda
from .report import LayerReport, Report

__all__ = [
    "GPTQ", "RIA", "RTN", "LayerReport", "Magnitude", "Recipe", "Report", "SparseGPT", "Wanda",
]  # fmt: skip
