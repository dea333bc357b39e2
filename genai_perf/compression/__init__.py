"""Pruning and quantization: solvers on one layer, recipes, and the engine over a whole checkpoint.

`genai_perf.compress` is the call that goes from folder to folder.
"""

from .recipe import Recipe
from .report import LayerReport, Report
from .steps import GPTQ, RIA, RTN, Magnitude, SparseGPT, Wanda

__all__ = [
    "GPTQ", "RIA", "RTN", "LayerReport", "Magnitude", "Recipe", "Report", "SparseGPT", "Wanda",
]  # fmt: skip
