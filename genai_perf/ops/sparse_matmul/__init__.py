"""y = x @ W^T + bias, straight from the stored values and places of a sparse W."""

from .api import SPARSE_MATMUL, SPARSE_MATMUL_BACKWARD, sparse_matmul

__all__ = ["SPARSE_MATMUL", "SPARSE_MATMUL_BACKWARD", "sparse_matmul"]
