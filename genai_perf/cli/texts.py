"""Which text calibrates and which one measures, and what to call them in a report."""

from collections.abc import Sequence
from pathlib import Path

from ..bench.side_by_side import Text

_HELD_OUT_SHARE = 5  # one part in five


def calibration_text(file: Path | None) -> Text:
    """A calibration file's texts, else the calibration modules of the standard library."""
    if file is None:
        return _modules("calibration", "modules of Python's standard library")
    from ..compression.calibration import read_texts

    return Text(tuple(read_texts(file)), str(file.name))


def demo_texts(calibration: Path | None, evaluation: Path | None, *, embedded: bool
               ) -> tuple[Text, Text]:  # fmt: skip
    """Calibration and evaluation text of the demo, for the embedded model or another one.

    With a calibration file and no evaluation file, the last fifth of the file is kept from
    calibration and measured on, so that the two are of one kind.
    """
    known = calibration_text(calibration)
    if evaluation is not None:
        measured = calibration_text(evaluation)
    elif calibration is None:
        unseen = "neither training nor calibration saw" if embedded else "calibration did not see"
        measured = _modules("heldout", f"modules of Python's standard library that {unseen}")
    else:
        first, last = _split(known.documents)
        known = Text(first, f"the first four fifths of {known.source}")
        measured = Text(last, f"the last fifth of {calibration.name}, kept from calibration")
    return known, measured


def _modules(split: str, words: str) -> Text:
    from ..models import stdlib_text

    found = stdlib_text(split)
    return Text(tuple(text for _, text in found), f"{len(found)} {words}")


def _split(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first four fifths and the last fifth, by texts, or by lines where there is one text."""
    parts = list(texts) if len(texts) > 1 else texts[0].splitlines(keepends=True)
    cut = len(parts) - max(1, len(parts) // _HELD_OUT_SHARE)
    if len(texts) > 1:
        return tuple(parts[:cut]), tuple(parts[cut:])
    return ("".join(parts[:cut]),), ("".join(parts[cut:]),)
