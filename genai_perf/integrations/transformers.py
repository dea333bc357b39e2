"""transformers models from checkpoint folders: streamed block by block, or running compressed."""

from .checkpoint_model import BlockInputs, CheckpointModel
from .loading import load_compressed

__all__ = ["BlockInputs", "CheckpointModel", "load_compressed"]
