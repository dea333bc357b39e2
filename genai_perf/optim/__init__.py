"""Optimizers whose state is held in 8 bits: AdamW8bit and Lion8bit."""

from .optimizers import AdamW8bit, Lion8bit

__all__ = ["AdamW8bit", "Lion8bit"]
