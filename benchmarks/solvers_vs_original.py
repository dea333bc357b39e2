"""The solvers of SparseGPT and GPTQ against the published algorithms in plain torch, in one run.

    python benchmarks/solvers_vs_original.py [--solver gptq] [--rows 4096] [--columns 4096]

Both get the same weight and Hessian and do all of it: damping, factor, sweep. The originals are
written here from the papers as their authors run them: blocks of 128 columns, one column of all
rows at a time, one torch operation a step, the inverse by Cholesky. SparseGPT without refinement
and GPTQ without search and order are the same results; with them they are better ones (errors are
printed).
"""

import argparse
import time
from statistics import median

import torch

from genai_perf.bench.machine import machine
from genai_perf.compression import gptq, sparsegpt
from genai_perf.compression.hessian import relative_error

GROUP = 128


def pruned(sparsity):
    """What the original SparseGPT keeps of each column of a block, chosen when the block begins."""

    def begin(part, factor):
        scores = part**2 / torch.diag(factor).reshape(1, -1) ** 2
        mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * sparsity) - 1]

        def keep(i, column):
            kept = column.clone()
            kept[mask[:, i]] = 0
            return kept

        return keep

    return begin


def rounded(part, factor):
    """int4, symmetric; a block is a group, whose scale covers its weights when it begins."""
    scale = (part.abs().amax(1) / 7.5).clamp(min=1e-30)
    return lambda i, column: torch.clamp(torch.round(column / scale), -8, 7) * scale


@torch.no_grad()
def original(weight, hessian, begin, damp_frac=0.01, block=GROUP):
    w, h = weight.clone(), hessian.clone()
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damp_frac * torch.diag(h).mean() * torch.eye(len(h))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        part, factor = w[:, start:stop].clone(), upper[start:stop, start:stop]
        new, errors = torch.zeros_like(part), torch.zeros_like(part)
        keep = begin(part, factor)
        for i in range(stop - start):
            column, d = part[:, i], factor[i, i]
            new[:, i] = keep(i, column)
            error = (column - new[:, i]) / d
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, start:stop] = new
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return w


def calls(solver, weight, hessian, sparsity, better):
    """name -> the call that is timed; the original first."""
    if solver == "sparsegpt":
        found = {
            "original": lambda: original(weight, hessian, pruned(sparsity)),
            "ours": {"refine": None},
            "ours, back-solve": {"search": 0},
            "ours, refined": {},
        }
        solve, options = sparsegpt.solve, {"sparsity": sparsity}
    else:
        found = {
            "original": lambda: original(weight, hessian, rounded),
            "ours": {"search": False},
            "ours, as by default": {"act_order": True},
        }
        solve, options = gptq.solve, {"group_size": GROUP}
    kept = list(found)[: None if better else 2]
    return {
        name: found[name] if callable(found[name])
        else lambda one=found[name]: solve(weight, hessian, **options, **one).weight
        for name in kept
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--solver", choices=("sparsegpt", "gptq"), default="sparsegpt")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--better", action="store_true", help="time refinement, or search, too")
    a = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(a.rows, a.columns) / a.columns**0.5
    x = torch.randn(a.columns + 1024, a.columns // 4) @ torch.randn(a.columns // 4, a.columns)
    x = x / (a.columns // 4) ** 0.5 + 0.5 * torch.randn(a.columns + 1024, a.columns)
    hessian = x.T @ x / len(x)
    print(machine(), f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    timed = calls(a.solver, weight, hessian, a.sparsity, a.better)
    seconds, errors = {name: [] for name in timed}, {}
    for _ in range(a.runs):
        for name, call in timed.items():
            begin = time.perf_counter()
            new = call()
            seconds[name].append(time.perf_counter() - begin)
            errors[name] = relative_error(weight, new, hessian)
    base = median(seconds["original"])
    print(f"{a.solver} {a.rows}x{a.columns}: seconds, speed, error over the original's")
    for name in timed:
        took = median(seconds[name])
        print(f"  {name:20s}{took:8.2f}{base / took:8.2f}x{errors[name] / errors['original']:9.4f}")


if __name__ == "__main__":
    main()
