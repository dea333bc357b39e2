"""Which layers an entry of a recipe names, and which layers must be treated alike."""

import re
from collections.abc import Iterable, Mapping

from ..io.validation import FUSED


def compile(entry: str) -> re.Pattern:
    """The expression of an entry "re:..."; ValueError where it is none."""
    try:
        return re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"Recipe: {entry!r} is not a regular expression: {error}") from error


def matches(entries: Iterable[str], layer: str) -> bool:
    """Whether one of the entries names the layer: by full name, by last part of the name, or as
    "re:" and an expression that the full name starts with."""
    return any(
        compile(entry).match(layer) is not None if entry.startswith("re:")
        else entry in (layer, layer.rpartition(".")[2])
        for entry in entries
    )  # fmt: skip


def check_fused(treatment: Mapping[str, object]) -> None:
    """Refuses different treatments of layers that servers fuse.

    Args:
        treatment: full name -> anything that is equal for layers treated alike.

    Raises:
        ValueError: names both layers.
    """
    for name, mine in treatment.items():
        parent, _, last = name.rpartition(".")
        for group in FUSED:
            if last != group[0]:
                continue
            for other in (f"{parent}.{sibling}" for sibling in group[1:]):
                if other in treatment and treatment[other] != mine:
                    raise ValueError(f"Recipe: {name} and {other} are one layer to a server and "
                                     f"need one scheme: name both or neither")  # fmt: skip
