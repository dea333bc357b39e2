"""The side file of a pruned checkpoint: its linears without their zeros.

It lies beside the ordinary tensors, which keep their zeros and load everywhere. Its name ends in
no suffix that other loaders look for; inside it is safetensors, `<layer>.values`, `<layer>.index`,
... for each layer, as `SparseTensor.state_dict` writes them.
"""

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .._checks import check_choice
from .._errors import CheckpointError
from ..formats import QuantizedTensor, SparseTensor, sparse, sparse24
from ..formats.base import FLOATS
from ..formats.sparse_tensor import LAYOUTS
from .checkpoints import Checkpoint
from .conversion import CONV1D_MODELS, model_dtype
from .dialects import quantized_layers
from .shards import join_files, map_tensor, read_header, write_file

NAME = "sparse_weights.gpst"
# A bitmask of bf16 is smaller than the matrix from 7 % zeros on; below this it is not worth a file.
LEAST_ZEROS = 0.3


@dataclass(frozen=True)
class SparseFile:
    """What `pack_sparse` wrote.

    Attributes:
        path: the side file.
        layers: layer -> its layout.
        nbytes: of the file, header and all.
        dense_nbytes: what the same layers take in bf16.
        skipped: layer -> why it is not in the file.
    """

    path: Path
    layers: dict[str, str]
    nbytes: int
    dense_nbytes: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        share = self.nbytes / max(1, self.dense_nbytes)
        return (f"{self.path}: {len(self.layers)} layers in {self.nbytes / 1e6:.2f} MB, "
                f"{share:.3f} of them in bf16; {len(self.skipped)} skipped")  # fmt: skip


def pack_sparse(path: str | Path, *, layout: str | None = None) -> SparseFile:
    """Writes the side file of a pruned checkpoint folder, dense or quantized to int8 or int4 by
    any tool, one layer in memory at a time; `load_compressed` then computes from it.

    Args:
        path: the folder; its other files are left as they are, and an old side file is replaced.
        layout: "2:4" or "bitmask"; None: for each layer 2:4 where it fits.

    Raises:
        CheckpointError: the folder cannot be read, or no layer of it is pruned.
    """
    check_choice("pack_sparse", "layout", layout, (None, *LAYOUTS))
    checkpoint = Checkpoint(path)
    target = checkpoint.path / NAME
    work = checkpoint.path / f".{NAME}.{secrets.token_hex(4)}.tmp"
    layers, parts, dense = {}, [], 0
    skipped = {name: "experts in one stack, which no packed layer computes"
               for name in checkpoint.names()
               if "experts." in name and len(checkpoint.info(name).shape) == 3}  # fmt: skip
    work.mkdir()
    try:
        for name, weight in _weights(checkpoint):
            try:
                packed = _pack(weight, layout)
            except ValueError as error:
                skipped[name] = str(error)
                continue
            layers[name] = packed.layout
            dense += 2 * packed.shape.numel()
            parts.append(work / f"{len(parts):06d}")
            write_file(parts[-1], packed.state_dict(f"{name}."))
        if not parts:
            reasons = (f": {name}: {reason}" for name, reason in skipped.items())
            raise CheckpointError(f"{checkpoint.path}: no linear layer is pruned and can be packed"
                                  f"{next(reasons, '')}")  # fmt: skip
        join_files(parts, work / NAME)
        (work / NAME).replace(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return SparseFile(target, layers, target.stat().st_size, dense, skipped)


def _weights(checkpoint: Checkpoint):
    """(layer, (N, K) weight) of everything that may be a linear layer in a block."""
    quantized = quantized_layers(checkpoint)
    held = {key for stored in quantized.values() for key in stored.keys}
    for name, stored in quantized.items():
        yield name, stored.read(checkpoint, model_dtype(checkpoint))
    transposed = checkpoint.config.get("model_type") in CONV1D_MODELS
    for key in checkpoint.names():
        info = checkpoint.info(key)
        linear = key.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOATS
        outside = any(part in key for part in ("embed", "wte", "wpe", "lm_head"))
        if linear and key not in held and not outside:
            weight = checkpoint.tensor(key)
            yield key.removesuffix(".weight"), weight.T.contiguous() if transposed else weight


def _pack(weight: torch.Tensor | QuantizedTensor, layout: str | None) -> SparseTensor:
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
    zeros = float((dense == 0).float().mean()) if dense.numel() else 0.0
    if zeros < LEAST_ZEROS:
        raise ValueError(f"{zeros:.0%} of it is zero, less than {LEAST_ZEROS:.0%}")
    if layout is None:
        padded = torch.nn.functional.pad(dense != 0, (0, -dense.shape[1] % 4))
        layout = "2:4" if (padded.unflatten(1, (-1, 4)).sum(2) <= 2).all() else "bitmask"
    return (sparse24 if layout == "2:4" else sparse).pack(weight)


def read_sparse(path: str | Path) -> dict[str, SparseTensor]:
    """The layers of a folder's side file, on mapped bytes; none where it has no such file.

    Raises:
        CheckpointError: the file is damaged; names the layer.
    """
    file = Path(path) / NAME
    if not file.exists():
        return {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, info in read_header(file).items():
        layer, _, part = key.rpartition(".")
        states.setdefault(layer, {})[part] = map_tensor(info)
    try:
        return {layer: SparseTensor.from_state_dict(state) for layer, state in states.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
