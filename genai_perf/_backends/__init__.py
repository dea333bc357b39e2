"""Toolchain glue, one file a backend; none of them knows an op.

Each file exports `unavailable() -> str | None`: one sentence if the toolchain is not here.
"""

from importlib import import_module

BACKENDS = ("triton", "cuda", "nki", "native", "reference")


def backends() -> dict[str, str | None]:
    """What this machine has: backend name -> None if usable, else the reason why not."""
    return {
        name: None if name == "reference" else import_module(f"{__name__}.{name}").unavailable()
        for name in BACKENDS
    }
