"""The kernel as it ships, for the ahead-of-time gate."""

from collections.abc import Iterator

from ...._backends.triton_aot import Source
from .kernel import _optimizer_step_kernel
from .launch import config

FLOATS = ("keep1", "take1", "keep2", "take2", "decay", "rate", "unbias", "eps")


def source(kind: str, dtype: str, block_size: int, *, quantized: bool = True) -> Source:
    options = config(block_size)
    warps = options.pop("num_warps")
    constants = {"ADAMW": kind == "adamw", "QUANTIZED": quantized, **options}
    if kind == "lion":
        constants |= {"second_ptr": None, "second_scale_ptr": None}
    if not quantized:
        constants |= {"first_scale_ptr": None, "second_scale_ptr": None}
    held = "u8" if quantized else "fp32"
    pointers = {"p_ptr": dtype, "grad_ptr": dtype, "first_ptr": held, "second_ptr": held}
    name = f"optimizer_step {kind} {dtype} b{block_size}" + " fp32 moments" * (not quantized)
    return Source(name, _optimizer_step_kernel, constants, "fp32", pointers, FLOATS,
                  {"num_warps": warps, "num_stages": 1}, "none")  # fmt: skip


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships; the subset holds one source."""
    yield source("adamw", "bf16", 256)
    if subset:
        return
    for kind in ("adamw", "lion"):
        for dtype in ("fp32", "fp16"):
            yield source(kind, dtype, 256)
        yield source(kind, "bf16", 64)
        yield source(kind, "bf16", 4096)
        yield source(kind, "bf16", 256, quantized=False)
    yield source("lion", "bf16", 256)
