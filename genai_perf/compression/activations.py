"""Layer inputs of all calibration windows, in a folder instead of memory."""

from collections.abc import Iterator, MutableSequence
from pathlib import Path

import torch


class OnDisk(MutableSequence):
    """A list of tensors of which none stays in memory, each in a file of its own.

    Args:
        folder: an empty folder; its files are this list's until it is deleted.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._items: list[tuple[torch.Size, torch.dtype, torch.device]] = []

    def _file(self, i: int) -> Path:
        return self._folder / f"{i:06d}"

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> torch.Tensor:
        shape, dtype, device = self._items[i]
        data = torch.empty(shape, dtype=dtype)
        with open(self._file(i), "rb") as stream:
            stream.readinto(memoryview(data.view(-1).view(torch.uint8).numpy()))
        return data.to(device)

    def __setitem__(self, i: int, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        self._file(i).write_bytes(memoryview(data.view(-1).view(torch.uint8).numpy()))
        self._items[i] = (data.shape, data.dtype, tensor.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def insert(self, i: int, tensor: torch.Tensor) -> None:
        if i != len(self):
            raise NotImplementedError("OnDisk grows at its end only")
        self._items.append((tensor.shape, tensor.dtype, tensor.device))
        self[i] = tensor

    def clear(self) -> None:
        self._items.clear()  # the next tensors overwrite the files

    def __delitem__(self, i: int) -> None:
        raise NotImplementedError("OnDisk does not shrink")
