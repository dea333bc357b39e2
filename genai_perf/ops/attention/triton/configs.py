"""Tile sizes, warps and stages: measured where there is a table, else by the rule below.

The rule is **not measured here**: it starts from configurations that others published for flex
attention and Triton's tutorial on the A100, H100, B200 and MI300X, changed where the compiler
spilled registers or passed the chip's shared memory (`make aot` checks each of them).
"""

from pathlib import Path

import torch

from ...._backends import triton as toolchain
from ...._backends import tuning
from .problem import Problem, block_dim

TUNED = Path(__file__).parent.parent / "tuned"

KERNELS = ("fwd", "dkdv", "dq", "dbias")
# Largest head dimension of a column, padded to a power of two.
DIMS = (64, 128, 256)

# BLOCK_M, BLOCK_N, num_warps, num_stages for bfloat16 and float16, one column of DIMS each: plain
# (masks, windows and sinks), then with softcap, ALiBi or a bias, which need more registers.
HALF = {
    "sm_80": {
        "fwd": (
            ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
            ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        ),
        "dkdv": (
            ((32, 32, 4, 2), (32, 64, 8, 1), (16, 64, 8, 1)),
            ((32, 32, 4, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
        ),
        "dq": (
            ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
            ((64, 32, 8, 1), (64, 64, 8, 2), (64, 32, 8, 1)),
        ),
        "dbias": (((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),) * 2,
    },
    "sm_90": {
        "fwd": (
            ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
            ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        ),
        "dkdv": (
            ((32, 128, 8, 2), (32, 64, 8, 1), (32, 64, 8, 1)),
            ((32, 64, 8, 1), (32, 64, 8, 1), (16, 64, 8, 1)),
        ),
        "dq": (
            ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
            ((128, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        ),
        "dbias": (((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1)),) * 2,
    },
    "sm_100": {
        "fwd": (
            ((128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
            ((128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 1)),
        ),
        "dkdv": (
            ((64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 8, 1)),
            ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
        ),
        "dq": (
            ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
            ((128, 32, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
        ),
        "dbias": (((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),) * 2,
    },
    "gfx942": {
        "fwd": (
            ((128, 64, 4, 1), (128, 64, 4, 1), (64, 32, 4, 1)),
            ((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
        ),
        "dkdv": (((32, 64, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),) * 2,
        "dq": (((64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),) * 2,
        "dbias": (((64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),) * 2,
    },
}
# float32: the exact products cost several instructions each, so tiles are small everywhere.
FLOAT = {
    "fwd": ((64, 32, 4, 2), (64, 32, 4, 1), (32, 16, 4, 1)),
    "dkdv": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    "dq": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    "dbias": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
}
# Several tiles even for the short sequences that the interpreter can take.
INTERPRETER = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}


def family(arch: str) -> str:
    """The row of HALF for an architecture; `small` for chips with 100 KiB of shared memory."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    if number in (90, 100, 103):
        return "sm_100" if number > 90 else "sm_90"
    return "sm_80" if number == 80 else "small"


def rule(kernel: str, arch: str, dtype: torch.dtype, headdim: int, headdim_v: int,
         heavy: bool = False) -> dict:  # fmt: skip
    """Launch keywords where nothing was measured; `heavy` with softcap, ALiBi or a bias."""
    dim = max(block_dim(headdim), block_dim(headdim_v))
    if kernel == "delta":
        return {"BLOCK_M": 64 if dim <= 128 else 32, "num_warps": 4, "num_stages": 1}
    if arch == "interpreter":
        return INTERPRETER
    column = next((i for i, largest in enumerate(DIMS) if dim <= largest), len(DIMS) - 1)
    chip = family(arch)
    if dtype == torch.float32 or chip == "small":
        block_m, block_n, warps, stages = FLOAT[kernel][column]
    else:
        block_m, block_n, warps, stages = HALF[chip][kernel][heavy][column]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def precision(q: torch.Tensor) -> str:
    """How tl.dot multiplies float32: three TF32 products, which keep float32's accuracy."""
    exact = q.dtype != torch.float32 or toolchain.arch(q.device).startswith(("gfx", "interpreter"))
    return "ieee" if exact else "tf32x3"


def choose(kernel: str, problem: Problem) -> dict:
    """The launch keywords for one kernel: measured on this device if there is a table, else `rule`.

    They depend on head dimensions, dtype, mask and sequence length, never on the batch, so that
    each sequence gets the same bits alone and in a batch.
    """
    q = problem.q
    heavy = bool(problem.softcap or problem.alibi_slopes is not None or problem.bias is not None)
    exact = {
        "kernel": kernel,
        "dtype": str(q.dtype).removeprefix("torch."),
        "block_d": block_dim(problem.headdim),
        "block_dv": block_dim(problem.headdim_v),
        "causal": problem.window_right is not None,
        "heavy": heavy,
    }
    measured = None
    if kernel != "delta" and q.device.type == "cuda":
        device, version = toolchain.device_key(q.device), toolchain.version()
        near = {"seqlen": problem.seqlen_k}
        measured = tuning.lookup(TUNED, device, version, exact, near)
    arch = toolchain.arch(q.device)
    return measured or rule(kernel, arch, q.dtype, problem.headdim, problem.headdim_v, heavy)
