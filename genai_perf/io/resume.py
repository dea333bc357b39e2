"""Writing a checkpoint folder over several lives: finished parts outlast the process."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .journal import Journal
from .shards import hash_file, map_tensor, read_header, write_file
from .writer import ShardWriter, check_destination, disk


def work_folder(dst: Path) -> Path:
    """Where an unfinished `dst` lies; a destination that exists is refused."""
    work = dst.parent / f".{dst.name}.partial"
    if dst.exists() and work.exists() and not (work / "folder").exists():
        shutil.rmtree(work)  # killed after the last rename
    check_destination(dst)
    return work


class ResumableWriter(ShardWriter):
    """A `ShardWriter` that takes up what an earlier one with the same key left behind.

        with ResumableWriter(dst, key=key, source=src) as writer:
            for i in range(len(writer.finished), blocks):
                writer.write(tensors_of(i), note={"block": i})    # committed when it returns
            writer.commit(config)

    Everything lies in `.<name>.partial` beside the destination. A process killed at any moment,
    `commit` included, leaves a folder from which the next one goes on; leaving the `with` without
    `commit` and without a finished write removes it.

    Args:
        dst, source, max_shard_size: as in `ShardWriter`.
        key: what the output depends on, plain JSON data; work under another key is refused.
        restart: drop what an earlier run left.

    Attributes:
        finished: the notes of the writes that are committed, in order.

    Raises:
        CheckpointError: see `ShardWriter`; another process is writing the same destination; an
            unfinished run with another key.
    """

    def __init__(self, dst: str | Path, *, key: Mapping[str, object],
                 source: str | Path | None = None, max_shard_size: int | str = "5GB",
                 restart: bool = False):  # fmt: skip
        self._key, self._restart = key, restart
        self._digests: dict[Path, str] = {}
        self.work = work_folder(Path(dst))
        super().__init__(dst, source=source, max_shard_size=max_shard_size)

    @property
    def finished(self) -> list[dict]:
        return [entry["note"] for entry in self._journal.entries]

    def _open(self) -> Path:
        self._journal = Journal(self.work, self._key, self.dst, self._restart)
        folder = self.work / "folder"
        if not folder.exists():  # deleted, or about to be made
            folder.mkdir()
            self._journal.entries, self._journal.plan = [], None
        self._take_up(folder)
        return folder

    def _take_up(self, folder: Path) -> None:
        """Keeps the finished parts, up to the first that is not as it was written."""
        entries, known = self._journal.entries, set()
        if self._journal.plan is None:
            for n, entry in enumerate(entries):
                files = {folder / name: digest for name, digest in entry["parts"].items()}
                if not all(f.exists() and hash_file(f) == digest for f, digest in files.items()):
                    del entries[n:]
                    break
                known |= files.keys()
            for stray in set(folder.iterdir()) - known:
                stray.unlink()
        self._parts = [folder / name for entry in entries for name in entry["parts"]]
        self._names = {name for entry in entries for name in entry["tensors"]}

    def __exit__(self, *error: object) -> None:
        self._journal.close()
        if self.work.exists() and not self._journal.entries:
            shutil.rmtree(self.work)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(entry["nbytes"] for entry in self._journal.entries)

    def __contains__(self, tensor: str) -> bool:
        """Whether a tensor of this name is written."""
        return tensor in self._names

    def write(self, tensors: dict[str, torch.Tensor], note: dict | None = None) -> None:
        """Commits tensors, usually those of one block, together: all of them or none.

        Args:
            tensors: name in the checkpoint -> tensor.
            note: plain JSON data that `finished` gives back.
        """
        first = len(self._parts)
        super().write(tensors)
        with disk(self.dst):
            parts = {part.name: self._digests.pop(part) for part in self._parts[first:]}
            entry = {"parts": parts, "tensors": list(tensors), "note": note or {}}
            entry["nbytes"] = sum(tensor.nbytes for tensor in tensors.values())
            self._journal.entries.append(entry)
            self._journal.save()

    def _write_part(self, part: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._digests[part] = write_file(part, tensors)

    def read(self, n: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of finished write n, mapped one at a time."""
        for name in self._journal.entries[n]["parts"]:
            for tensor, info in read_header(self.folder / name).items():
                yield tensor, map_tensor(info)

    def commit(self, config: dict) -> Path:
        super().commit(config)
        with disk(self.dst):
            shutil.rmtree(self.work)
        return self.dst

    def _plan(self) -> dict[str, list[str]]:
        if self._journal.plan is None:
            self._journal.plan = super()._plan()
            self._journal.save()
        return self._journal.plan
