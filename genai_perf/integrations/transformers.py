"""transformers models: attention by name, checkpoint folders streamed block by block, or running
compressed.

Importing this module registers `attn_implementation="genai_perf"` and GenaiPerfConfig, which
quantizes a model while `from_pretrained` reads it; inside `read_compressed` it runs what others
quantized from its bytes.
"""

from . import quantizer
from .attention import register
from .checkpoint_model import BlockInputs, CheckpointModel
from .loading import load_compressed
from .stored_quantizer import read_compressed

register()
GenaiPerfConfig = quantizer.register()

__all__ = [
    "BlockInputs",
    "CheckpointModel",
    "GenaiPerfConfig",
    "load_compressed",
    "read_compressed",
]
