"""Tile sizes, warps and stages: measured where there is a table, else those of `tiles`."""

from pathlib import Path

import torch

from ...._backends import triton as toolchain
from .problem import Problem, block_dim, largest_tile
from .rules import WHOLE_TILES
from .tiles import ALL, DIMS, DROPOUT, FLOAT, HALF, HEAVY, NAMES, PLAIN

TUNED = Path(__file__).parent.parent / "tuned"

# The fewest rows that wgmma and tcgen05 multiply.
LEAST_OWN_TILE = 64
# The largest head dimension of float32 that multiplies in TF32.
MOST_TF32 = 64
# Several tiles even for the short sequences that the interpreter can take.
INTERPRETER = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}


def family(arch: str) -> str:
    """The key of HALF for an architecture; `small` for chips with 100 KiB of shared memory."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    if number in (90, 100, 103):
        return "sm_100" if number > 90 else "sm_90"
    return "sm_80" if number == 80 else "small"


def rule(kernel: str, arch: str, dtype: torch.dtype, headdim: int, headdim_v: int,
         rules: int = PLAIN) -> dict:  # fmt: skip
    """Launch keywords where nothing was measured; `rules` is PLAIN, HEAVY or DROPOUT."""
    dim = max(block_dim(headdim), block_dim(headdim_v))
    if kernel == "delta":
        config = {"BLOCK_M": 64 if dim <= 128 else 32, "num_warps": 4, "num_stages": 1}
        return config | ({"maxnreg": ALL} if arch.startswith("sm_") else {})
    if arch == "interpreter":
        return INTERPRETER
    column = next((i for i, largest in enumerate(DIMS) if dim <= largest), len(DIMS) - 1)
    chip = family(arch)
    if dtype == torch.float32 or chip == "small":
        table = FLOAT["gfx942" if chip == "gfx942" else "nvidia"]
    else:
        table = HALF[chip]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")
    return dict(zip(names, table[kernel][rules][column], strict=False))


def precision(arch: str, dtype: torch.dtype, *headdims: int) -> str:
    """How tl.dot multiplies: float32 in three TF32 products, which keep its accuracy, or exactly
    where matrices of TF32 lack or where the three would take more registers than there are."""
    exact = arch.startswith(("gfx", "interpreter")) or max(map(block_dim, headdims)) > MOST_TF32
    return "ieee" if dtype != torch.float32 or exact else "tf32x3"


def matrix(kernel: str, arch: str, dtype: torch.dtype, precision: str, config: dict) -> str:
    """Which matrix instruction a compiled kernel must have, as `triton_aot.Source` says."""
    if kernel == "delta" or (dtype == torch.float32 and precision == "ieee" and "gfx" not in arch):
        return "none"
    rows = config["BLOCK_N" if kernel == "dkdv" else "BLOCK_M"]
    return "own" if dtype != torch.float32 and rows >= LEAST_OWN_TILE else "any"


def choose(kernel: str, problem: Problem) -> dict:
    """The launch keywords for one kernel: measured on this device if there is a table, else `rule`.

    They depend on head dimensions, dtype, mask and sequence length, never on the batch, so that
    each sequence gets the same bits alone and in a batch.
    """
    q, o = problem.q, problem.options
    exact = {
        "kernel": kernel,
        "dtype": str(q.dtype).removeprefix("torch."),
        "block_d": block_dim(problem.headdim),
        "block_dv": block_dim(problem.headdim_v),
        "causal": o.window_right >= 0,
        "rules": NAMES[kind(problem)],
    }
    measured = None
    if kernel != "delta":
        measured = toolchain.measured(TUNED, q.device, exact, {"seqlen": problem.seqlen_k})
    arch = toolchain.arch(q.device)
    config = measured or rule(kernel, arch, q.dtype, problem.headdim, problem.headdim_v,
                              kind(problem))  # fmt: skip
    if problem.blocks_kind() != WHOLE_TILES.value or kernel == "delta":
        return config
    return within(config, o.block_q, o.block_k)


def within(config: dict, block_q: int, block_k: int) -> dict:
    """Tiles no larger than the blocks of a block mask, so that a tile lies within one of them."""
    most = {"BLOCK_M": largest_tile(block_q), "BLOCK_N": largest_tile(block_k)}
    return config | {name: min(config[name], size) for name, size in most.items()}


def kind(problem: Problem) -> int:
    return DROPOUT if problem.options.dropout_p else HEAVY if problem.heavy() else PLAIN
