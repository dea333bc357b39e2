"""Tile sizes, warps, stages and the number of splits: measured where there is a table, else by a
rule that is **not measured here**.

Decoding waits for memory: tiles are as small in queries as the matrix instructions allow, and keys
are split until every multiprocessor has a few programs. `make aot` checks that each compiles
without spills.
"""

from pathlib import Path

import torch

from ...._backends import triton as toolchain
from ...attention.triton.problem import block_dim

TUNED = Path(__file__).parent.parent / "tuned"

MERGE_WARPS, APPEND_WARPS = 2, 1
MAX_SPLITS = 128
WAVES = 2  # programs for each multiprocessor that a launch aims at

# Several tiles even for the short sequences that the interpreter can take.
INTERPRETER = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}


def rule(arch: str, dtype: torch.dtype, headdim: int, headdim_v: int, rows: int) -> dict:
    """Launch keywords of the split kernel; rows: queries times heads of a group.

    They do not depend on the batch, so that with a fixed number of splits each sequence gets the
    same bits alone and in a batch.
    """
    if arch == "interpreter":
        return INTERPRETER
    dim = max(block_dim(headdim), block_dim(headdim_v))
    whole, amd = dtype == torch.float32, arch.startswith("gfx")
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 16 if whole else 64 if dim <= 128 else 32)
    # Four warps spill in some combinations of options at 128 on sm_80 and up to 64 on later chips.
    wide = not whole and not amd and (dim > 64) == (arch == "sm_80")
    warps = 8 if dim > 128 or wide else 4
    if whole:
        block_n, stages = 32, 2 if dim <= 64 else 1
    else:
        block_n = 32 if amd and dim > 128 else 64
        stages = {"sm_80": 3, "sm_100": 1}.get(arch, 2) if dim <= 64 else 2
    stages = 1 if amd else stages
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def choose(q: torch.Tensor, cache_dtype: torch.dtype, headdim_v: int, rows: int, room: int
           ) -> dict:  # fmt: skip
    """The launch keywords of the split kernel: measured on this device if there is a table, else
    `rule`. room: keys that a sequence has room for; as in `rule`, nothing depends on the batch."""
    exact = {
        "kernel": "split",
        "dtype": str(q.dtype).removeprefix("torch."),
        "cache": str(cache_dtype).removeprefix("torch."),
        "block_d": block_dim(q.shape[3]),
        "block_dv": block_dim(headdim_v),
        "rows": 1 << (rows - 1).bit_length(),
    }
    measured = toolchain.measured(TUNED, q.device, exact, {"room": room})
    return measured or rule(toolchain.arch(q.device), q.dtype, q.shape[3], headdim_v, rows)


def precision(q: torch.Tensor) -> str:
    """How tl.dot multiplies float32: three TF32 products, which keep float32's accuracy."""
    exact = q.dtype != torch.float32 or toolchain.arch(q.device).startswith(("gfx", "interpreter"))
    return "ieee" if exact else "tf32x3"


def splits(device: torch.device, programs: int, room: int, config: dict) -> int:
    """Where the caller leaves it open: enough parts to fill the device, none below 4 tiles."""
    most = max(1, room // (4 * config["BLOCK_N"]))
    wanted = -(-WAVES * toolchain.processors(device) // programs)
    return max(1, min(wanted, most, MAX_SPLITS))
