"""One step of AdamW or Lion over a parameter, its moments in 8 bits."""

from .api import adamw_step, lion_step

__all__ = ["adamw_step", "lion_step"]
