"""Checkpoint folders: read, validated, written; one dialect of quantized tensors per file."""

from .checkpoints import Checkpoint, check_finite
from .conversion import convert
from .sparse_file import pack_sparse
from .validation import Validation, validate
from .writer import ShardWriter

__all__ = ["Checkpoint", "ShardWriter", "Validation", "check_finite", "convert", "pack_sparse",
           "validate"]  # fmt: skip
