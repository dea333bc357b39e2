"""What an unfinished run has written so far: a journal beside the files, and who is writing."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

from .._errors import CheckpointError

_FILE, _LOCK = "journal.json", "lock"


class Journal:
    """The record of a run in its work folder, replaced as a whole at every change: a process killed
    at any moment leaves the old record or the new one.

    Args:
        folder: the work folder; made where it is missing.
        key: what the run depends on, plain JSON data; a record with another key is not taken over.
        owner: what is being written, for messages.
        restart: begin a new record whatever is there.

    Attributes:
        entries: one dict for each finished write, in order; plain JSON data.
        plan: shard name -> names of the parts it is joined from, once joining has begun.

    Raises:
        CheckpointError: another process is at work in the folder; the record there is of a run with
            another key, or cannot be read.
    """

    def __init__(self, folder: Path, key: Mapping[str, object], owner: Path,
                 restart: bool = False):  # fmt: skip
        self.folder, self._key = folder, json.loads(json.dumps(key))
        folder.mkdir(exist_ok=True)
        self._lock = open(folder / _LOCK, "w")  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(f"destination {owner}: another process is writing it") from None
        self.entries: list[dict] = []
        self.plan: dict[str, list[str]] | None = None
        try:
            if (folder / _FILE).exists() and not restart:
                self._read(owner)
            else:
                self.save()
        except BaseException:
            self.close()
            raise

    def _read(self, owner: Path) -> None:
        try:
            record = json.loads((self.folder / _FILE).read_text("utf-8"))
            key, self.entries, self.plan = record["key"], record["entries"], record["plan"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / _FILE}: is not the record of a run: delete the "
                                  f"folder to start again") from error  # fmt: skip
        others = [word for word in {**key, **self._key} if key.get(word) != self._key.get(word)]
        if others:
            raise CheckpointError(
                f"destination {owner}: {self.folder} holds {len(self.entries)} finished parts of a "
                f"run with another {', '.join(others)}: repeat that run to go on with it, restart "
                f"to drop it, or name another destination"
            )

    def save(self) -> None:
        """Makes the record on disk the present one."""
        record = {"key": self._key, "entries": self.entries, "plan": self.plan}
        draft = self.folder / f"{_FILE}.new"
        with open(draft, "w", encoding="utf-8") as stream:
            json.dump(record, stream)
            sync(stream)
        draft.replace(self.folder / _FILE)

    def close(self) -> None:
        """Lets another process write."""
        self._lock.close()


def sync(stream) -> None:
    """The content of an open file is on the disk when this returns."""
    stream.flush()
    os.fsync(stream.fileno())
