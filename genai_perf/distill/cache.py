"""A teacher kept on disk: the top-k log-probabilities of every token of a text, computed once.

A cache is a folder. `cache.json` says what it is of (teacher, tokenizer and text, as hashes) and
lists the shards with the hash of each; a shard is a safetensors file:

    tokens    int32 (windows, seqlen)          the text
    ids       int32 (windows, seqlen, k)       the most likely next tokens after each position
    logprobs  fp16  (windows, seqlen, k)       their natural log-probabilities

Shards are memory-mapped when read. They are written one at a time, each into a file beside it that
takes its name when it is whole, and cache.json after each: an interrupted cache goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._checks import check_positive, fail
from .._errors import CheckpointError
from ..io.shards import map_tensor, read_header, write_file
from ..ops.distill_loss import TopK

MANIFEST = "cache.json"
VERSION = 1
SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class Identity:
    """What a cache is of. Hashes are sha256, in hexadecimal digits.

    Args:
        teacher: of the teacher's checkpoint.
        tokenizer: of its vocabulary.
        text: of the windows of tokens.
        vocab_size: tokens that the teacher's probabilities are over.
        k, temperature: what was kept, and at which temperature.
        windows, seqlen: shape of the text.
    """

    teacher: str
    tokenizer: str
    text: str
    vocab_size: int
    k: int
    temperature: float
    windows: int
    seqlen: int


def text_hash(windows: Tensor) -> str:
    """Of token ids (windows, seqlen)."""
    data = windows.to(torch.int64).contiguous().cpu().numpy().tobytes()
    return hashlib.sha256(str(tuple(windows.shape)).encode() + data).hexdigest()


def vocabulary_hash(vocabulary: dict[str, int]) -> str:
    """Of a tokenizer's tokens and their ids."""
    items = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def write_cache(
    path: str | Path,
    windows: Tensor,
    top_k: Callable[[Tensor], TopK],
    identity: Identity,
    *,
    batch: int = 8,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> "TeacherCache":
    """Fill a cache, or go on with one that was interrupted.

    Args:
        path: the folder; new, or a cache of the same identity.
        windows: int64 (windows, seqlen) token ids.
        top_k: the teacher: token ids (batch, seqlen) to a TopK (batch, seqlen, k).
        identity: what the cache is of.
        batch: windows a call of the teacher.
        shard_bytes: of a shard, roughly.
        progress: called with (windows done, windows in all).

    Returns:
        TeacherCache: the finished cache.

    Raises:
        CheckpointError: the folder holds something else, or a cache of another teacher, tokenizer
            or text.
        ValueError: windows that are not those of the identity.
    """
    path = Path(path)
    check_positive("write_cache", batch=batch, shard_bytes=shard_bytes)
    if windows.dim() != 2 or tuple(windows.shape) != (identity.windows, identity.seqlen):
        fail("write_cache", "windows", f"({identity.windows}, {identity.seqlen})",
             f"shape {tuple(windows.shape)}")  # fmt: skip
    if text_hash(windows) != identity.text:
        fail("write_cache", "windows", "the text of the identity", "another")
    done = _open_or_create(path, identity)
    each = identity.seqlen * (4 + 6 * identity.k)
    step = max(1, min(len(windows), shard_bytes // each))
    shards = []
    for number, first in enumerate(range(0, len(windows), step)):
        name, part = f"shard-{number:05d}.safetensors", windows[first : first + step]
        old = done.get(name)
        if old and old["windows"] == len(part) and _is_whole(path / name, old["sha256"]):
            shards.append(old)
        else:
            shards.append(_write_shard(path / name, part, top_k, identity, batch))
            _write_manifest(path, identity, shards, complete=False)
        if progress:
            progress(first + len(part), len(windows))
    _write_manifest(path, identity, shards, complete=True)
    return TeacherCache(path)


def _open_or_create(path: Path, identity: Identity) -> dict[str, dict]:
    if not (path / MANIFEST).exists():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path}: exists and is no teacher cache: name another folder")
        path.mkdir(parents=True, exist_ok=True)
        _write_manifest(path, identity, [], complete=False)
        return {}
    manifest = _read_manifest(path)
    _check_identity(path, manifest["identity"], asdict(identity))
    return {shard["file"]: shard for shard in manifest["shards"]}


def _check_identity(path: Path, found: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{path}: is the cache of another {name}: {_short(found.get(name))}, not "
                f"{_short(value)}"
            )


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


def _is_whole(file: Path, sha256: str) -> bool:
    return file.exists() and _hash(file) == sha256


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@torch.no_grad()
def _write_shard(file: Path, windows: Tensor, top_k: Callable[[Tensor], TopK], identity: Identity,
                 batch: int) -> dict:  # fmt: skip
    ids, logprobs = [], []
    for part in windows.split(batch):
        kept = top_k(part)
        shape = (*part.shape, identity.k)
        if kept.ids.shape != shape:
            fail("write_cache", "top_k's ids", f"of shape {shape}", tuple(kept.ids.shape))
        ids.append(kept.ids.to(torch.int32).cpu())
        logprobs.append(kept.logprobs.to(torch.float16).cpu())
    tensors = {"tokens": windows.to(torch.int32), "ids": torch.cat(ids),
               "logprobs": torch.cat(logprobs)}  # fmt: skip
    partial = file.with_suffix(".partial")
    write_file(partial, tensors)
    os.replace(partial, file)
    return {"file": file.name, "windows": len(windows), "sha256": _hash(file)}


def _write_manifest(path: Path, identity: Identity, shards: list[dict], *, complete: bool) -> None:
    manifest = {"format": "genai_perf teacher cache", "version": VERSION,
                "identity": asdict(identity), "complete": complete, "shards": shards}  # fmt: skip
    partial = path / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path / MANIFEST)


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{path}: cache of version {manifest['version']}, this package "
                                  f"reads {VERSION}")  # fmt: skip
        Identity(**manifest["identity"])
        _ = manifest["shards"], manifest["complete"]
    except OSError as error:
        raise CheckpointError(f"{path}: is no teacher cache: {error.strerror}") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: is no teacher cache: {MANIFEST} is damaged") from None
    return manifest


class TeacherCache:
    """A finished cache, memory-mapped: windows of tokens with their top-k teacher.

    Args:
        path: the folder.
        tail: how the top-k losses treat what the k leave; see TopK.

    Raises:
        CheckpointError: no cache, one that was interrupted, a shard that is missing or cut short.
    """

    def __init__(self, path: str | Path, *, tail: str = "bin"):
        self.path, self.tail = Path(path), tail
        manifest = _read_manifest(self.path)
        if not manifest["complete"]:
            raise CheckpointError(f"{path}: the cache was interrupted: run the same command again")
        self.identity = Identity(**manifest["identity"])
        self._shards = manifest["shards"]
        self._starts, self._tensors = [], []
        first = 0
        for shard in self._shards:
            self._starts.append(first)
            header = read_header(self.path / shard["file"])
            self._tensors.append({name: map_tensor(info) for name, info in header.items()})
            first += shard["windows"]
        if first != self.identity.windows:
            raise CheckpointError(f"{path}: holds {first} windows of {self.identity.windows}")

    def __len__(self) -> int:
        return self.identity.windows

    def _find(self, index: int) -> tuple[dict[str, Tensor], int]:
        if not 0 <= index < len(self):
            fail("TeacherCache", "index", f"from 0 to {len(self) - 1}", index)
        shard = next(i for i in reversed(range(len(self._starts))) if self._starts[i] <= index)
        return self._tensors[shard], index - self._starts[shard]

    def tokens(self, index: int) -> Tensor:
        """Window `index`: int64 (seqlen)."""
        tensors, row = self._find(index)
        return tensors["tokens"][row].long()

    def teacher(self, indices: Sequence[int]) -> TopK:
        """The teacher of some windows: ids int64 and log-probabilities fp32, (n, seqlen, k)."""
        found = [self._find(int(index)) for index in indices]
        ids = torch.stack([tensors["ids"][row] for tensors, row in found]).long()
        logprobs = torch.stack([tensors["logprobs"][row] for tensors, row in found]).float()
        return TopK(ids, logprobs, self.tail, self.identity.temperature)

    def check(self, *, tokenizer: str | None = None, text: str | None = None) -> None:
        """Raises CheckpointError if the cache is of another tokenizer or text, by their hashes."""
        wanted = {"tokenizer": tokenizer, "text": text}
        found = asdict(self.identity)
        given = {name: value for name, value in wanted.items() if value is not None}
        _check_identity(self.path, found, given)

    def verify(self) -> None:
        """Raises CheckpointError if the bytes of a shard are not those that were written."""
        for shard in self._shards:
            if _hash(self.path / shard["file"]) != shard["sha256"]:
                raise CheckpointError(f"{self.path / shard['file']}: damaged: its hash differs")
