"""The kernels as they ship: every layout and kind of value."""

from collections.abc import Iterator

from ...._backends.triton_aot import Source
from .kernels import FLOATS, INT4, INT8, _sparse_decode_kernel, _sparse_gemv_kernel
from .launch import CONFIG

KERNELS = {"gemv": _sparse_gemv_kernel, "decode": _sparse_decode_kernel}
VALUES = {"fp32": FLOATS, "bf16": FLOATS, "fp16": FLOATS, "i8": INT8, "u8": INT4}
LAYOUTS = {"2:4": True, "bitmask": False}


def source(kernel: str, values: str, layout: str, bias: bool = True) -> Source:
    function, kind = KERNELS[kernel], VALUES[values].value
    settings = CONFIG | {"KIND": kind, "TWO_FOUR": LAYOUTS[layout], "HAS_BIAS": bias}
    constants = {name: settings[name] for name in function.arg_names if name in settings}
    absent = {"start_ptr": LAYOUTS[layout], "scale_ptr": kind == FLOATS.value,
              "bias_ptr": not bias}  # fmt: skip
    constants |= {n: None for n, gone in absent.items() if gone and n in function.arg_names}
    pointers = {"values_ptr": values, "index_ptr": "u8", "start_ptr": "i64", "out_ptr": "fp32"}
    options = {name: CONFIG[name] for name in ("num_warps", "num_stages")}
    return Source(f"sparse {kernel} {values} {layout}", function, constants, "bf16", pointers, (),
                  options, "none")  # fmt: skip


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships, the same for every `arch`; the subset holds one source a kernel and
    layout."""
    for kernel in KERNELS:
        for layout in LAYOUTS:
            for values in ("bf16",) if subset else VALUES:
                yield source(kernel, values, layout)
