"""The kernels as they ship: every row of the configuration rule, with the options it serves."""

from collections.abc import Iterator

import torch

from ...._backends.triton_aot import Source
from ...attention.triton.problem import block_dim
from . import MAX_HEADDIM, configs
from .append_kernels import _decode_append_kernel, _decode_rotate_kernel
from .decode_kernels import _decode_merge_kernel, _decode_split_kernel

KERNELS = {
    "split": _decode_split_kernel,
    "merge": _decode_merge_kernel,
    "append": _decode_append_kernel,
    "rotate": _decode_rotate_kernel,
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CACHES = {"same": 0, "int8": 1, "fp8": 2}
BYTES = {"int8": "i8", "fp8": "u8"}
PLAIN = {
    "HAS_LEFT": False, "HAS_RIGHT": False, "SOFTCAP": False, "ALIBI": False, "LEFTPAD": False,
    "PAGED": False, "INDEXED": False, "SINKS": False, "IN_SEQUENCE": True,
}  # fmt: skip
FEATURES = {
    "full": {},
    "causal paged": {"HAS_RIGHT": True, "PAGED": True},
    "window": {"HAS_LEFT": True, "HAS_RIGHT": True, "INDEXED": True, "LEFTPAD": True},
    "everything": {
        "HAS_LEFT": True, "HAS_RIGHT": True, "SOFTCAP": True, "ALIBI": True, "LEFTPAD": True,
        "PAGED": True, "SINKS": True,
    },
}  # fmt: skip


def source(kernel: str, arch: str, dtype: torch.dtype, headdim: int, cache: str, feature: str,
           rows: int = 4, interleaved: bool = False) -> Source:  # fmt: skip
    """One kernel under one set of options, in the configuration of the rule."""
    options = PLAIN | FEATURES[feature]
    config = {
        "split": configs.rule(arch, dtype, headdim, headdim, rows),
        "merge": {"num_warps": configs.MERGE_WARPS, "num_stages": 1},
    }.get(kernel, {"num_warps": configs.APPEND_WARPS, "num_stages": 1})
    exact = dtype != torch.float32 or arch.startswith("gfx")
    block = block_dim(headdim)
    values = options | config | {
        "HEAD_DIM": headdim, "HEAD_DIM_V": headdim, "BLOCK_D": block, "BLOCK_DV": block,
        "PRECISION": "ieee" if exact else "tf32x3", "NATURAL": dtype == torch.float32,
        "CACHE": CACHES[cache], "ROTARY_HALF": headdim // 2,
        "BLOCK_HALF": block_dim(headdim // 2), "INTERLEAVED": interleaved,
    }  # fmt: skip
    absent = {
        "leftpad_ptr": not options["LEFTPAD"], "table_ptr": not options["PAGED"],
        "batch_idx_ptr": not options["INDEXED"], "k_scale_ptr": cache == "same",
        "v_scale_ptr": cache == "same", "slopes_ptr": not options["ALIBI"],
        "sinks_ptr": not options["SINKS"],
    }  # fmt: skip
    function = KERNELS[kernel]
    constants = {name: values[name] for name in function.arg_names if name in values}
    constants |= {n: None for n, gone in absent.items() if gone and n in function.arg_names}
    pointers = {n: "fp32" for n in ("sums_ptr", "max_ptr", "sum_ptr", "lse_ptr", "k_scale_ptr",
                                    "v_scale_ptr", "slopes_ptr")}  # fmt: skip
    pointers |= {n: "i32" for n in ("seqlens_ptr", "leftpad_ptr", "table_ptr", "batch_idx_ptr",
                                    "positions_ptr")}  # fmt: skip
    if cache != "same":
        pointers |= {"k_ptr": BYTES[cache], "v_ptr": BYTES[cache]}
    return Source(
        f"decode {kernel} {TYPES[dtype]} {cache} {headdim} {feature} rows {rows}", function,
        constants, TYPES[dtype], pointers, ("softmax_scale", "softcap"),
        {name: config[name] for name in ("num_warps", "num_stages")},
        "any" if kernel == "split" else "none",
    )  # fmt: skip


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships for `arch`; the subset holds one source a kernel."""
    half, whole = torch.bfloat16, torch.float32
    if subset:
        for kernel in KERNELS:
            yield source(kernel, arch, half, 128, "same", "causal paged")
        return
    for dim in (64, 128, 256):
        for feature in FEATURES:
            yield source("split", arch, half, dim, "same", feature)
        for cache in ("int8", "fp8"):
            yield source("split", arch, half, dim, cache, "causal paged")
        if dim <= MAX_HEADDIM[whole]:
            yield source("split", arch, whole, dim, "same", "causal paged")
            yield source("split", arch, whole, dim, "same", "everything")
        yield source("split", arch, torch.float16, dim, "fp8", "everything")
        for rows in (32, 64):
            yield source("split", arch, half, dim, "same", "everything", rows)
    yield source("split", arch, half, 80, "same", "causal paged")
    for cache in CACHES:
        yield source("merge", arch, half, 128, cache, "everything")
        yield source("append", arch, half, 128, cache, "causal paged")
        yield source("append", arch, half, 128, cache, "window", interleaved=True)
    yield source("rotate", arch, half, 128, "same", "full")
    yield source("rotate", arch, whole, 128, "same", "full", interleaved=True)
