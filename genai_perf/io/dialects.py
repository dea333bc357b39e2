"""Which dialect a checkpoint is written in, and its quantized layers."""

from .._errors import CheckpointError
from . import awq, bitsandbytes, compressed_tensors, gptq
from .checkpoints import CONFIG, Checkpoint
from .stored import Stored

DIALECTS = {d.METHOD: d for d in (compressed_tensors, bitsandbytes, gptq, awq)}


def quantized_layers(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The quantized linear layers of a checkpoint, by the names that it gives them.

    Returns:
        dict: module name -> Stored; empty for a dense checkpoint.

    Raises:
        CheckpointError: a quantization that genai_perf does not read, named.
    """
    if checkpoint.quantization is None:
        return {}
    method = checkpoint.quantization.get("quant_method")
    if method not in DIALECTS:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: quantization {method!r} is not read: "
                              f"must be one of {', '.join(DIALECTS)}")  # fmt: skip
    return DIALECTS[method].find(checkpoint)
