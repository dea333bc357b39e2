"""Tile sizes, warps and stages: a rule, **not measured**; `make aot` checks it for spills."""

from pathlib import Path

import torch

from ...._backends import triton as toolchain

TUNED = Path(__file__).parent.parent / "tuned"
# Up to as many rows take the kernel of one row: the limit that the op's docstring names.
FEW_ROWS = 8
MERGE = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}
MAX_SPLITS = 16
WAVES = 2  # programs for each multiprocessor that one row aims at

# Several tiles even for the small weights that the interpreter can take.
INTERPRETER = {
    "gemv": {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 1, "num_stages": 1},
    "gemm": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 1, "num_stages": 1},
    "dx": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 1, "num_stages": 1},
    "rounded": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 1, "num_stages": 1},
}


def rule(kernel: str, arch: str, dtype: torch.dtype, *, pairs: bool = True) -> dict[str, int]:
    """Launch keywords of "gemv", "gemm" or "dx", the same for any number of rows, so that a row has
    the same bits alone and among others. `pairs`: no byte of 4-bit codes lies in two rows."""
    if arch == "interpreter":
        return INTERPRETER[kernel]
    if kernel == "gemv":
        return {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    if arch.startswith("gfx"):
        rows = 32 if dtype == torch.float32 else 64
        return tile | {"BLOCK_M": rows, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}
    stages = 3 if pairs else 2
    if arch == "sm_90":
        return tile | {"num_warps": 4, "num_stages": stages}
    # Without maxnreg ptxas spills a register so that one more program fits on a processor.
    return tile | {"num_warps": 8, "num_stages": stages, "maxnreg": 255}


def choose(kernel: str, x: torch.Tensor, format: str, n: int, k: int) -> dict[str, int]:
    """The launch keywords: measured on this device if there is a table, else `rule`."""
    dtype = str(x.dtype).removeprefix("torch.")
    exact = {"kernel": kernel, "dtype": dtype, "format": format}
    measured = toolchain.measured(TUNED, x.device, exact, {"n": n, "k": k})
    return measured or rule(kernel, toolchain.arch(x.device), x.dtype, pairs=k % 2 == 0)


def rounded_rule(arch: str, m: int, *, own: bool, groups: bool) -> dict[str, int]:
    """Launch keywords of "rounded", whose BLOCK_K is the 128 columns that share a scale with
    `groups`. `own`: the chip multiplies the codes themselves, not as float16."""
    if arch == "interpreter":
        return INTERPRETER["rounded"]
    amd = arch.startswith("gfx")
    if m <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4,
                "num_stages": 2 if amd else 4}  # fmt: skip
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8}
    if amd or not own:
        return tile | {"BLOCK_M": 64, "num_stages": 1 if amd else 2}
    # With groups a second sum is held: 128 x 128 spills.
    return tile | {"BLOCK_N": 64 if groups else 128, "num_stages": 4 if arch != "sm_80" else 3}


def choose_rounded(device: torch.device, format: str, m: int, n: int, k: int, *, own: bool,
                   groups: bool) -> dict[str, int]:  # fmt: skip
    """The launch keywords: measured on this device if there is a table, else `rounded_rule`."""
    exact = {"kernel": "rounded", "format": format, "groups": groups, "few": m <= 16}
    measured = toolchain.measured(TUNED, device, exact, {"m": m, "n": n, "k": k})
    return measured or rounded_rule(toolchain.arch(device), m, own=own, groups=groups)


def precision(arch: str, dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: three TF32 products, which keep float32's accuracy."""
    exact = dtype != torch.float32 or arch.startswith(("gfx", "interpreter"))
    return "ieee" if exact else "tf32x3"


def splits(device: torch.device, n: int, k: int, config: dict[str, int]) -> int:
    """Parts of K that fill the device for one row, each of 4 tiles at least; never by the rows."""
    programs = -(-n // config["BLOCK_N"])
    wanted = -(-WAVES * toolchain.processors(device) // programs)
    return max(1, min(wanted, k // (4 * config["BLOCK_K"]), MAX_SPLITS))
