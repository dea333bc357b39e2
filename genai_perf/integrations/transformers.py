"""transformers models: attention by name, checkpoint folders streamed block by block, or running
compressed.

Importing this module registers `attn_implementation="genai_perf"`.
"""

from .attention import register
from .checkpoint_model import BlockInputs, CheckpointModel
from .loading import load_compressed

__all__ = ["BlockInputs", "CheckpointModel", "load_compressed"]

register()
