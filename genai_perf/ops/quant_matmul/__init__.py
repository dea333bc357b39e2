"""y = x @ dequant(W)^T + bias, straight from the packed bytes of a quantized W."""

from .api import QUANT_MATMUL, QUANT_MATMUL_BACKWARD, quant_matmul

__all__ = ["QUANT_MATMUL", "QUANT_MATMUL_BACKWARD", "quant_matmul"]
