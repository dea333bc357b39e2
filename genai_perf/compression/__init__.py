"""Pruning and quantization: solvers on one layer, recipes, and the engine over a whole checkpoint."""

from .recipe import GPTQ, RTN, Magnitude, Recipe, SparseGPT, Wanda

__all__ = ["GPTQ", "RTN", "Magnitude", "Recipe", "SparseGPT", "Wanda"]
