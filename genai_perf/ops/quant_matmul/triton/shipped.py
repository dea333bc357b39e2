"""The kernels as they ship, for the ahead-of-time gate."""

from collections.abc import Iterator

import torch

from ...._backends.triton_aot import Source
from . import FORMATS, configs, rounded
from .kernels import (
    _quant_gemm_dx_kernel,
    _quant_gemm_kernel,
    _quant_gemv_kernel,
    _quant_merge_kernel,
)

# What rows of x rounded to one byte meet: the format, and whether 128 columns share a scale.
ROUNDED = {"int8": ("int8", False), "fp8": ("fp8", False), "fp8 block": ("fp8", True)}
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


def weight_arguments(function, weight: str, values: dict) -> tuple[dict, dict]:
    """(constants, pointer types) of a kernel that reads `weight`, one of WEIGHTS."""
    fmt, run, options = WEIGHTS[weight]
    layout = {"FORMAT": FORMATS[fmt], "PAIRS": True, "NESTED": False, "ZEROS": False,
              "RUN": min(run or values["BLOCK_K"], values["BLOCK_K"])} | options  # fmt: skip
    values = layout | values
    constants = {name: values[name] for name in function.arg_names if name in values}
    absent = {"zero_ptr": not layout["ZEROS"], "nested_ptr": not layout["NESTED"],
              "offset_ptr": not layout["NESTED"]}  # fmt: skip
    constants |= {name: None for name, gone in absent.items() if gone}
    pointers = dict.fromkeys(("scale_ptr", "nested_ptr", "offset_ptr", "table_ptr"), "fp32")
    pointers |= {"q_ptr": "i8" if fmt == "int8" else "u8", "zero_ptr": "u8"}
    return constants, pointers | ({"scale_ptr": "u8"} if layout["NESTED"] else {})


def source(kernel: str, arch: str, dtype: torch.dtype, weight: str) -> Source:
    pairs = WEIGHTS[weight][2].get("PAIRS", True)
    config, function = configs.rule(kernel, arch, dtype, pairs=pairs), KERNELS[kernel]
    values = config | {"BIAS": True, "PRECISION": configs.precision(arch, dtype)}
    constants, pointers = weight_arguments(function, weight, values)
    matrix = "none" if kernel == "gemv" else "own" if dtype != torch.float32 else "any"
    return Source(
        f"quant_matmul {kernel} {TYPES[dtype]} {weight}", function, constants, TYPES[dtype],
        pointers | {"parts_ptr": "fp32"}, (),
        {name: n for name, n in config.items() if not name.startswith("BLOCK_")}, matrix,
    )  # fmt: skip


def rounded_source(arch: str, weight: str, m: int) -> Source:
    fmt, groups = ROUNDED[weight]
    kind = rounded.kind(fmt, arch)
    own = kind != rounded.FP8_AS_HALF.value
    config = configs.rounded_rule(arch, m, own=own, groups=groups)
    constants = {name: n for name, n in config.items() if name.startswith("BLOCK_")}
    constants |= {"KIND": kind, "GROUPS": groups, "WHOLE": True, "BIAS": True}
    codes = "i8" if fmt == "int8" else "u8"
    # Triton's tcgen05 has no int8 product, and 16 rows are too few for that of any type.
    own_matrix = m > 16 and not (fmt == "int8" and arch == "sm_100")
    return Source(
        f"quant_matmul rounded {weight} {m} rows", rounded._rounded_gemm_kernel, constants, "fp32",
        {"x_ptr": codes, "w_ptr": codes, "y_ptr": "bf16", "bias_ptr": "bf16"}, (),
        {name: n for name, n in config.items() if not name.startswith("BLOCK_")}
        | {"enable_fp_fusion": False}, "own" if own_matrix else "any",
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
    for weight in ("fp8 block",) if subset else ROUNDED:
        for m in (4096,) if subset else (1, 4096):
            yield rounded_source(arch, weight, m)
    options = {name: configs.MERGE[name] for name in ("num_warps", "num_stages")}
    yield Source(
        "quant_matmul merge bf16", _quant_merge_kernel,
        {"BLOCK": configs.MERGE["BLOCK"], "BIAS": True}, "bf16", {"parts_ptr": "fp32"}, (), options,
        "none",
    )  # fmt: skip
