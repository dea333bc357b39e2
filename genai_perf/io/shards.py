"""One safetensors file: its header checked against its length, its tensors mapped one at a time.

The format (huggingface/safetensors, README): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the data. Read here and not with `safe_open`, because
each tensor gets a mapping of its own that is unmapped with it: a pass over a checkpoint of any
size keeps one tensor resident, where one mapping of the file keeps every page touched so far.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .._errors import CheckpointError
from .journal import sync

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the format's own reader


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, first byte `start` in it, `nbytes`, `dtype` and `shape`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, every offset checked against the file's length.

    Args:
        file: path of the file.

    Returns:
        dict: tensor name -> TensorInfo, in the order of the header.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(f"{file}: truncated or not safetensors: the header should "
                                      f"have {length} bytes, the file has {size}")  # fmt: skip
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _info(file, name, entry, 8 + length, size) for name, entry in header.items()}


def _info(file: Path, name: str, entry: object, base: int, size: int) -> TensorInfo:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: header entry of tensor {name!r} is not valid: "
                              f"{json.dumps(entry)[:200]}") from None  # fmt: skip
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(f"{file}: tensor {name!r} of shape {list(shape)} and dtype {dtype} "
                              f"takes {nbytes} bytes, its header gives {end - begin}")  # fmt: skip
    if base + end > size:
        raise CheckpointError(f"{file}: truncated: tensor {name!r} ends at byte {base + end}, "
                              f"the file has {size}")  # fmt: skip
    return TensorInfo(file, dtype, shape, base + begin, nbytes)


def map_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor on its own private mapping of the file: pages come in when touched, writing to
    the tensor does not write to the file, and the mapping goes when the tensor goes."""
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    skew = info.start % mmap.ALLOCATIONGRANULARITY
    try:
        with open(info.file, "rb") as stream:
            mapping = mmap.mmap(stream.fileno(), skew + info.nbytes, access=mmap.ACCESS_COPY,
                                offset=info.start - skew)  # fmt: skip
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{info.file}: cannot be mapped: {error}") from None
    data = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=skew)
    if info.start % info.dtype.itemsize:  # written by a tool that does not align
        data = data.clone()
    return data.view(info.dtype).reshape(info.shape)


def write_file(file: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Writes `tensors` as one safetensors file, one tensor at a time, through to the disk.

    Args:
        file: path to create.
        tensors: name -> tensor of any strides, on any device; each is copied when its turn comes.

    Returns:
        str: sha256 of the file.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    digest = hashlib.sha256()
    with open(file, "wb") as stream:

        def put(data) -> None:
            stream.write(data)
            digest.update(data)

        put(_pack_header((name, t.dtype, t.shape) for name, t in tensors.items()))
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                put(memoryview(flat.view(torch.uint8).numpy()))
        sync(stream)
    return digest.hexdigest()


def hash_file(file: Path) -> str:
    """sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def join_files(files: list[Path], target: Path) -> None:
    """Joins safetensors files into one by copying bytes: no tensor enters memory."""
    infos = {name: info for file in files for name, info in read_header(file).items()}
    infos = dict(sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize))
    with open(target, "wb") as out:
        out.write(_pack_header((name, i.dtype, i.shape) for name, i in infos.items()))
        for info in infos.values():
            with open(info.file, "rb") as stream:  # one at a time: there may be thousands
                stream.seek(info.start)
                left = info.nbytes
                while left:
                    left -= out.write(stream.read(min(left, 1 << 20)))
        sync(out)


def _pack_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length and JSON header of tensors that follow in this order, widest dtype first: then each
    starts on a multiple of its item size, which readers that view the bytes in place need."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body
