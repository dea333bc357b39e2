"""The kernels as they ship, for the ahead-of-time gate."""

from collections.abc import Iterator

import torch

from ...._backends.triton_aot import Source
from . import FORMATS, configs
from .kernels import (
    _quant_gemm_dx_kernel,
    _quant_gemm_kernel,
    _quant_gemv_kernel,
    _quant_merge_kernel,
)

KERNELS = {"gemv": _quant_gemv_kernel, "gemm": _quant_gemm_kernel, "dx": _quant_gemm_dx_kernel}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# How the weights of real layers lie: columns that share a scale (None: the whole row).
WEIGHTS = {
    "nf4": ("nf4", 64, {}),
    "nf4 double": ("nf4", 64, {"NESTED": True}),
    "nf4 odd rows": ("nf4", 1, {"PAIRS": False, "NESTED": True}),
    "int4": ("int4", 128, {}),
    "int4 zeros g32": ("int4", 32, {"ZEROS": True}),
    "int4 zeros g24": ("int4", 8, {"ZEROS": True}),
    "int8": ("int8", None, {}),
    "fp8": ("fp8", None, {}),
    "fp8 block": ("fp8", 128, {}),
    "fp8_e5m2": ("fp8_e5m2", None, {}),
}


def source(kernel: str, arch: str, dtype: torch.dtype, weight: str) -> Source:
    fmt, run, options = WEIGHTS[weight]
    config = configs.rule(kernel, arch, dtype)
    values = {
        "FORMAT": FORMATS[fmt], "PAIRS": True, "NESTED": False, "ZEROS": False, "BIAS": True,
        "RUN": min(run or config["BLOCK_K"], config["BLOCK_K"]),
        "PRECISION": configs.precision(arch, dtype),
    } | options | config  # fmt: skip
    function = KERNELS[kernel]
    constants = {name: values[name] for name in function.arg_names if name in values}
    absent = {"zero_ptr": not values["ZEROS"], "nested_ptr": not values["NESTED"],
              "offset_ptr": not values["NESTED"]}  # fmt: skip
    constants |= {name: None for name, gone in absent.items() if gone}
    pointers = {
        "q_ptr": "i8" if fmt == "int8" else "u8", "scale_ptr": "u8" if values["NESTED"] else "fp32",
        "zero_ptr": "u8", "nested_ptr": "fp32", "offset_ptr": "fp32", "table_ptr": "fp32",
        "parts_ptr": "fp32",
    }  # fmt: skip
    matrix = "none" if kernel == "gemv" else "own" if dtype != torch.float32 else "any"
    return Source(
        f"quant_matmul {kernel} {TYPES[dtype]} {weight}", function, constants, TYPES[dtype],
        pointers, (), {name: config[name] for name in ("num_warps", "num_stages")}, matrix,
    )  # fmt: skip


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships for `arch`; the subset holds one source a kernel."""
    for kernel in KERNELS:
        if subset:
            yield source(kernel, arch, torch.bfloat16, "nf4")
            continue
        for weight in WEIGHTS:
            yield source(kernel, arch, torch.bfloat16, weight)
        for weight in ("nf4 double", "int4 zeros g32", "fp8 block"):
            yield source(kernel, arch, torch.float32, weight)
        yield source(kernel, arch, torch.float16, "int4")
    options = {name: configs.MERGE[name] for name in ("num_warps", "num_stages")}
    yield Source(
        "quant_matmul merge bf16", _quant_merge_kernel,
        {"BLOCK": configs.MERGE["BLOCK"], "BIAS": True}, "bf16", {"parts_ptr": "fp32"}, (), options,
        "none",
    )  # fmt: skip
