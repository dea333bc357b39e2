"""The kernels as they ship: every row of the configuration rule, with the options it serves."""

from collections.abc import Iterator

import torch

from ...._backends.triton_aot import Source
from . import configs, tiles
from .bwd_kernels import (
    _attention_bwd_delta_kernel,
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
)
from .dbias_kernel import _attention_bwd_dbias_kernel
from .fwd_kernel import _attention_fwd_kernel
from .problem import block_dim

KERNELS = {
    "fwd": _attention_fwd_kernel,
    "dkdv": _attention_bwd_dkdv_kernel,
    "dq": _attention_bwd_dq_kernel,
    "dbias": _attention_bwd_dbias_kernel,
    "delta": _attention_bwd_delta_kernel,
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

PLAIN = {
    "HAS_LEFT": False, "HAS_RIGHT": False, "SOFTCAP": False, "ALIBI": False, "BIAS": 0,
    "BLOCKS": 0, "DROPOUT": False, "VARLEN": False, "SINKS": False, "SCALE_FIRST": False,
}  # fmt: skip
EVERYTHING = {
    "HAS_LEFT": True, "HAS_RIGHT": True, "SOFTCAP": True, "ALIBI": True, "BIAS": 1, "BLOCKS": 1,
    "SINKS": True, "SCALE_FIRST": True,
}  # fmt: skip
FEATURES = {
    "full": {},
    "causal": {"HAS_RIGHT": True},
    "window": {"HAS_LEFT": True, "HAS_RIGHT": True, "SINKS": True},
    "varlen": {"HAS_RIGHT": True, "VARLEN": True},
    "blocks": {"HAS_RIGHT": True, "BLOCKS": 1},
    "parts of blocks": {"HAS_RIGHT": True, "BLOCKS": 2, "SCALE_FIRST": True},
    "softcap": {"HAS_RIGHT": True, "SOFTCAP": True, "SCALE_FIRST": True},
    "alibi": {"HAS_RIGHT": True, "ALIBI": True, "SCALE_FIRST": True},
    "bias": {"BIAS": 1, "SCALE_FIRST": True},
    "mask": {"BIAS": 2, "SCALE_FIRST": True},
    "everything": EVERYTHING,
    "dropout": {"HAS_RIGHT": True, "DROPOUT": True},
    "dropout everything": EVERYTHING | {"DROPOUT": True},
}


def source(kernel: str, arch: str, dtype: torch.dtype, headdim: int, headdim_v: int, feature: str,
           config: dict[str, int] | None = None) -> Source:  # fmt: skip
    """One kernel under one set of options, in the configuration of the rule or in `config`."""
    options = PLAIN | FEATURES[feature]
    tile = "" if config is None else f" {config['BLOCK_M']}x{config['BLOCK_N']}"
    config = config or configs.rule(kernel, arch, dtype, headdim, headdim_v, kind(options))
    precision = configs.precision(arch, dtype, headdim, headdim_v)
    values = options | config | {
        "HEAD_DIM": headdim, "HEAD_DIM_V": headdim_v, "BLOCK_D": block_dim(headdim),
        "BLOCK_DV": block_dim(headdim_v), "PRECISION": precision,
        "NATURAL": dtype == torch.float32, "DLSE": True, "SHARED_M": False, "SHARED_N": False,
    }  # fmt: skip
    absent = {
        "bias_ptr": not options["BIAS"], "slopes_ptr": not options["ALIBI"],
        "sinks_ptr": not options["SINKS"], "dsinks_ptr": not options["SINKS"],
        "blocks_ptr": not options["BLOCKS"], "rng_ptr": not options["DROPOUT"],
        "cu_seqlens_q_ptr": not options["VARLEN"], "cu_seqlens_k_ptr": not options["VARLEN"],
    }  # fmt: skip
    if kernel == "dbias":
        absent["bias_ptr"] = False
    function = KERNELS[kernel]
    constants = {name: values[name] for name in function.arg_names if name in values}
    constants |= {n: None for n, gone in absent.items() if gone and n in function.arg_names}
    full = {name: "fp32" for name in ("lse_ptr", "dlse_ptr", "delta_ptr", "slopes_ptr",
                                      "dsinks_ptr")}  # fmt: skip
    full |= {"cu_seqlens_q_ptr": "i32", "cu_seqlens_k_ptr": "i32", "blocks_ptr": "u8",
             "rng_ptr": "i64"}  # fmt: skip
    if options["BIAS"] == 2:
        full["bias_ptr"] = "u8"
    matrix = configs.matrix(kernel, arch, dtype, precision, config)
    return Source(
        f"attention {kernel} {TYPES[dtype]} {headdim}x{headdim_v} {feature}{tile}", function,
        constants, TYPES[dtype], full, ("softmax_scale", "qk_scale", "softcap", "keep_scale"),
        {name: n for name, n in config.items() if name not in ("BLOCK_M", "BLOCK_N")}, matrix,
    )  # fmt: skip


def kind(options: dict[str, object]) -> int:
    if options["DROPOUT"]:
        return tiles.DROPOUT
    heavy = any(options[name] for name in ("SOFTCAP", "ALIBI", "BIAS")) or options["BLOCKS"] == 2
    return tiles.HEAVY if heavy else tiles.PLAIN


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """Everything that ships for `arch`; the subset holds one source a kernel."""
    half, whole = torch.bfloat16, torch.float32
    if subset:
        for kernel in ("fwd", "dkdv", "dq"):
            yield source(kernel, arch, half, 128, 128, "causal")
        return
    for kernel in ("fwd", "dkdv", "dq"):
        for dim in (64, 128, 256):
            for feature in FEATURES:
                yield source(kernel, arch, half, dim, dim, feature)
        for dim, dim_v in ((16, 16), (32, 32), (80, 80), (96, 96), (192, 128)):
            yield source(kernel, arch, half, dim, dim_v, "causal")
        for dim in (64, 128, 256):
            yield source(kernel, arch, torch.float16, dim, dim, "causal")
            for feature in ("causal", "everything", "dropout", "dropout everything"):
                yield source(kernel, arch, whole, dim, dim, feature)
        for dim in (64, 128):  # tiles that a block mask of 64 x 64 makes smaller
            small = configs.within(configs.rule(kernel, arch, half, dim, dim), 64, 64)
            yield source(kernel, arch, half, dim, dim, "blocks", small)
    for dim in (64, 128, 256):
        yield source("dbias", arch, half, dim, dim, "bias")
        for feature in ("everything", "dropout everything"):
            yield source("dbias", arch, half, dim, dim, feature)
            yield source("dbias", arch, whole, dim, dim, feature)
        yield source("delta", arch, half, dim, dim, "window")
