"""What a kernel is refused with: one sentence, and the line of the kernel that earned it."""

import sys
from pathlib import Path
from types import FrameType

_HERE = str(Path(__file__).parent)


class KernelError(ValueError):
    """A kernel does what the hardware does not; the message starts with the kernel's line."""


def kernel_frame() -> FrameType | None:
    """The innermost frame outside the interpreter."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return frame


def refuse(message: str) -> None:
    """Raises KernelError: `file:line in function: message`."""
    frame = kernel_frame()
    where = "" if frame is None else (
        f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}: "
    )  # fmt: skip
    raise KernelError(where + message)


def require(condition: bool, message: str) -> None:
    if not condition:
        refuse(message)
