"""A checkpoint folder in Hugging Face layout: validated whole when opened, read tensor by tensor.

Nothing of it is executed: pickle files are refused, and the code that a folder may carry is left
alone.
"""

import json
from functools import cached_property
from pathlib import Path

import torch

from .._errors import CheckpointError
from .shards import TensorInfo, map_tensor, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Bits that are all set in a code that is no number, and in no other.
_FP8_NONFINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float8_e8m0fnu: 0xFF}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Checkpoint:
    """A folder with `config.json` and `model.safetensors`, or shards and their index.

    Opening it reads every header and no weight. Each file must have the length that its header
    says, and the index must name files of this folder that hold the tensors it says.

    Args:
        path: the folder.

    Raises:
        CheckpointError: one sentence naming the file, the key or the tensor.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise CheckpointError(f"checkpoint folder {self.path} {what}")
        self.config: dict = read_json(self.path / CONFIG)
        self._tensors = self._scan()

    def _scan(self) -> dict[str, TensorInfo]:
        if (self.path / INDEX).exists():
            return self._scan_index()
        if not (self.path / SINGLE).exists():
            pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLES)
            if pickles:
                raise CheckpointError(f"{self.path / pickles[0]}: pickle files are refused, "
                                      f"because loading one runs code: convert it")  # fmt: skip
            raise CheckpointError(f"{self.path}: neither {SINGLE} nor {INDEX} is there")
        self._check_inside(SINGLE)
        return read_header(self.path / SINGLE)

    def _scan_index(self) -> dict[str, TensorInfo]:
        index = self.path / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must name the shard of each tensor")
        headers: dict[str, dict[str, TensorInfo]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise CheckpointError(f"{index}: shard of tensor {name!r} must be a file name, "
                                      f"got {json.dumps(shard)[:100]}")  # fmt: skip
            if shard not in headers:
                self._check_inside(shard, index)
                headers[shard] = read_header(self.path / shard)
            if name not in headers[shard]:
                raise CheckpointError(f"{index}: tensor {name!r} is not in its shard {shard}")
        return {name: headers[shard][name] for name, shard in weight_map.items()}

    def _check_inside(self, shard: str, index: Path | None = None) -> None:
        """A shard is a safetensors file of this folder; a link may lead only into the blobs of the
        hub cache that the folder belongs to (`<model>/snapshots/<revision>` -> `<model>/blobs`)."""
        source = index or self.path
        if Path(shard).suffix in _PICKLES:
            raise CheckpointError(f"{source}: shard {shard} is a pickle file, which is refused, "
                                  f"because loading one runs code")  # fmt: skip
        if "\\" in shard or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"{source}: shard {shard} points outside the folder")
        file = self.path / shard
        real, root = file.resolve(), self.path.resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
            raise CheckpointError(f"{source}: shard {shard} links outside the folder, to {real}")
        if not real.is_file():
            raise CheckpointError(f"{source}: shard {shard} is missing")

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype, bytes and place of a tensor, without reading it."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped: pages are read when touched and given back with it."""
        return map_tensor(self.info(name))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._tensors.values())

    @cached_property
    def quantization(self) -> dict | None:
        """`quantization_config` of config.json; None for a dense checkpoint."""
        found = self.config.get("quantization_config")
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(f"{self.path / CONFIG}: quantization_config must be an object")
        return found


def read_json(file: Path) -> dict:
    """A JSON object from a file, or one sentence that says what is wrong with it."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{file}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, got {type(value).__name__}")
    return value


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError naming the first NaN or infinity of a floating-point weight.

    Args:
        name: the tensor's name, for the sentence.
        tensor: any shape and dtype; integers pass.
    """
    if not tensor.is_floating_point():
        return
    if tensor.dtype in _FP8_NONFINITE:  # by its bits: a wider copy would take four times as much
        mask = _FP8_NONFINITE[tensor.dtype]
        bad = (tensor.view(torch.uint8) & mask) == mask
    else:
        # A sum is one pass without a temporary; only a sum that is not finite (also one that
        # overflowed) pays for the exact test.
        if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            return
        bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        where = [int(index) for index in bad.nonzero()[0]]
        raise CheckpointError(f"tensor {name!r} holds {float(tensor[tuple(where)])} at {where}")
