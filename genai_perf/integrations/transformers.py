"""transformers models from checkpoint folders: streamed block by block, or running compressed."""

from .checkpoint_model import BlockInputs, CheckpointModel

__all__ = ["BlockInputs", "CheckpointModel"]
