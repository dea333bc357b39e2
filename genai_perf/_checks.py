"""One wording for every ValueError: `op: argument must be <expected>, got <got>`."""

from collections.abc import Collection

import torch


def fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_tensor(op: str, **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_ndim(op: str, ndim: int, layout: str, **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if value.dim() != ndim:
            fail(op, name, f"{layout} ({ndim} dimensions)", f"shape {tuple(value.shape)}")


def check_dtype(op: str, allowed: Collection[torch.dtype], **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype not in allowed:
            fail(op, name, "one of " + ", ".join(map(str, allowed)), value.dtype)


def check_same(op: str, what: str, **tensors: torch.Tensor) -> None:
    """All tensors agree in attribute `what` (`dtype`, `device`) with the first one."""
    items = list(tensors.items())
    first_name, first = items[0]
    for name, value in items[1:]:
        if getattr(value, what) != getattr(first, what):
            fail(op, name, f"of the {what} of {first_name} ({getattr(first, what)})",
                 getattr(value, what))  # fmt: skip


def check_choice(op: str, argument: str, value: object, choices: Collection) -> None:
    if value not in choices:
        fail(op, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def check_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            fail(op, name, "positive", value)
