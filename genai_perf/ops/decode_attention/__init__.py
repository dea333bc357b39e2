"""Attention of few queries over a cache of keys and values, contiguous or paged."""

from .api import decode_attention
from .flash import flash_attn_with_kvcache

__all__ = ["decode_attention", "flash_attn_with_kvcache"]
