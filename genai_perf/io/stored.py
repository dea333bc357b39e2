"""A quantized linear layer in a checkpoint, whatever the dialect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..formats import QuantizedTensor
from .checkpoints import Checkpoint, check_finite


@dataclass(frozen=True)
class Stored:
    """keys: the tensors of the layer; decode: the weight, shapes and dtypes checked."""

    keys: tuple[str, ...]
    decode: Callable[[Mapping[str, torch.Tensor]], QuantizedTensor]

    def read(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> QuantizedTensor:
        """The weight, on the mapped bytes where the layouts agree.

        Args:
            checkpoint: where the layer was found.
            dtype: what it dequantizes to; None: what the dialect says.

        Raises:
            CheckpointError: a tensor is missing or does not fit, or a scale is not finite.
        """
        tensors = {key: checkpoint.tensor(key) for key in self.keys}
        for key, tensor in tensors.items():
            check_finite(key, tensor)
        qt = self.decode(tensors)
        return qt if dtype is None else replace(qt, dtype=dtype)
