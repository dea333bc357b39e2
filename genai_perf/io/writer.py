"""Writing a checkpoint folder: parts as they are finished, shards and index at the end, one rename.

A reader never sees half a checkpoint: everything is written into a temporary folder beside the
destination, which takes the destination's name when it is complete.
"""

import errno
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .._errors import CheckpointError
from .checkpoints import CONFIG, INDEX, SINGLE
from .shards import join_files, read_header, write_file

# What goes with the weights: tokenizer files of every kind, generation defaults, chat templates.
_CARRIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm")
_NOT_CARRIED = {CONFIG, INDEX, "quantize_config.json", "report.json", "recipe.json"}
_CARRIED_FOLDERS = ("additional_chat_templates", "chat_templates")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class ShardWriter:
    """Writes a checkpoint folder in parts, with bounded memory and disk, all or nothing.

        with ShardWriter(dst, source=src) as writer:
            for block in blocks:
                writer.write(tensors_of(block))       # on disk when it returns
            writer.commit(config)

    Leaving the `with` without `commit`, by an error or not, leaves nothing behind. `commit` joins
    neighbouring parts into shards of at most `max_shard_size` by copying bytes; where one shard
    suffices it is `model.safetensors`, else `model-00001-of-0000n.safetensors` with an index.

    Args:
        dst: the folder to create; it must not exist.
        source: a checkpoint folder whose tokenizer files, generation config and chat template
            `commit` carries over; None: nothing is.
        max_shard_size: bytes, or text such as "5GB"; a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: the destination exists or cannot be written, the disk is full, a tensor is
            written twice.
    """

    def __init__(self, dst: str | Path, *, source: str | Path | None = None,
                 max_shard_size: int | str = "5GB"):  # fmt: skip
        self.dst, self.source = Path(dst), None if source is None else Path(source)
        self.max_shard_size = _bytes(max_shard_size)
        check_destination(self.dst)
        self._names: set[str] = set()
        self._parts: list[Path] = []
        with disk(self.dst):
            self.folder = self._open()

    def _open(self) -> Path:
        folder = self.dst.parent / f".{self.dst.name}.{secrets.token_hex(4)}.tmp"
        folder.mkdir()
        return folder

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes tensors, usually those of one block, to disk; they can be freed when it returns.

        Args:
            tensors: name in the checkpoint -> tensor.
        """
        if again := next((name for name in tensors if name in self._names), None):
            raise CheckpointError(f"{self.dst}: tensor {again!r} is written twice")
        self._names.update(tensors)
        for group in _fill(tensors, {n: t.nbytes for n, t in tensors.items()}, self.max_shard_size):
            part = self.folder / f"part-{len(self._parts):06d}"
            with disk(self.dst):
                self._write_part(part, {name: tensors[name] for name in group})
            self._parts.append(part)

    def _write_part(self, part: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_file(part, tensors)

    def write_json(self, name: str, value: dict) -> None:
        """Writes `value` as the file `name` of the folder, such as report.json."""
        with disk(self.dst):
            (self.folder / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")

    def commit(self, config: dict) -> Path:
        """Makes the folder complete and gives it its name.

        Args:
            config: the content of config.json, with `quantization_config` where there is one.

        Returns:
            Path: `dst`.
        """
        with disk(self.dst):
            self._assemble()
            if self.source is not None:
                carry_over(self.source, self.folder)
            self.write_json(CONFIG, config)
            if self.dst.exists():  # came into being since the start
                raise CheckpointError(f"destination {self.dst} exists: name a folder that does not")
            self.folder.rename(self.dst)
        return self.dst

    def _assemble(self) -> None:
        plan = self._plan()
        weight_map, total = {}, 0
        for shard, parts in plan.items():
            self._join([self.folder / part for part in parts], self.folder / shard)
            header = read_header(self.folder / shard)
            weight_map |= dict.fromkeys(header, shard)
            total += sum(info.nbytes for info in header.values())
        if len(plan) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            index["weight_map"] = dict(sorted(weight_map.items()))
            self.write_json(INDEX, index)

    def _plan(self) -> dict[str, list[str]]:
        """Shard name -> names of the parts that it is joined from."""
        sizes = {part: sum(i.nbytes for i in read_header(part).values()) for part in self._parts}
        groups = list(_fill(self._parts, sizes, self.max_shard_size))
        names = [
            f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)
        ]
        names = [SINGLE] if len(groups) == 1 else names
        return {name: [p.name for p in parts] for name, parts in zip(names, groups, strict=True)}

    def _join(self, parts: list[Path], shard: Path) -> None:
        """Makes the shard of its parts, which go; begun and broken off, it can be begun again."""
        if not shard.exists() and len(parts) == 1:
            parts[0].rename(shard)
        elif not shard.exists():
            draft = shard.with_suffix(".new")
            join_files(parts, draft)
            draft.rename(shard)
        for part in parts:
            part.unlink(missing_ok=True)


def check_destination(dst: Path) -> None:
    """Refuses a destination that exists, or whose parent does not."""
    if dst.exists() or dst.is_symlink():
        raise CheckpointError(f"destination {dst} exists: name a folder that does not")
    if not dst.parent.is_dir():
        raise CheckpointError(f"destination {dst}: folder {dst.parent} does not exist")


def carry_over(source: Path, folder: Path) -> list[str]:
    """Copies tokenizer files, generation config and chat templates from one checkpoint folder to
    another; never weights, code or the model's own config.

    Returns:
        list: the names copied.
    """
    files = [file for file in source.iterdir() if file.suffix in _CARRIED]
    for name in _CARRIED_FOLDERS:
        files += (source / name).glob("*.jinja")
    names = []
    for file in sorted(files):
        name = file.relative_to(source)
        if file.is_file() and file.name not in _NOT_CARRIED and ".index." not in file.name:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
            names.append(str(name))
    return names


def _fill(items: dict | list, sizes: dict, limit: int) -> Iterator[list]:
    """Groups neighbours so that each group's size stays within `limit`, or is one item."""
    group, total = [], 0
    for item in items:
        if group and total + sizes[item] > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += sizes[item]
    if group:
        yield group


def _bytes(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?)B?\s*", size.upper())
        if not match:
            raise ValueError(f"max_shard_size must be bytes or text such as '5GB', got {size!r}")
        size = int(match[1]) * _UNITS[match[2]]
    if size <= 0:
        raise ValueError(f"max_shard_size must be positive, got {size}")
    return size


@contextmanager
def disk(dst: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one sentence that names the destination."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"destination {dst}: the disk is full") from error
        raise CheckpointError(f"destination {dst}: cannot be written: {error.strerror}") from error
