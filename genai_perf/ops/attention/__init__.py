"""softmax(scale q k^T) v by tiles, forward and backward."""

from .api import attention

__all__ = ["attention"]
