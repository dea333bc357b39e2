"""Checkpoint folders: read, validated, written; one dialect of quantized tensors per file."""

from .checkpoints import Checkpoint, check_finite
from .conversion import convert
from .writer import ShardWriter

__all__ = ["Checkpoint", "ShardWriter", "check_finite", "convert"]
