"""SparseGPT's solver against the published algorithm in plain torch, one layer, one run.

    python benchmarks/sparsegpt_vs_original.py [--rows 4096] [--columns 4096] [--runs 1]

Both get the same weight and Hessian and do all of it: damping, factor, sweep. The original is
written here from the paper (algorithm 1) as its authors run it: blocks of 128 columns, one column
of all rows at a time, one torch operation a step, the inverse by Cholesky. Ours without refinement
is the same result; with refinement it is a better one (errors are printed).
"""

import argparse
import time
from statistics import median

import torch

from genai_perf.bench.machine import machine
from genai_perf.compression import sparsegpt
from genai_perf.compression.hessian import relative_error


@torch.no_grad()
def original(weight, hessian, sparsity, damp_frac=0.01, block=128):
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
        scores = part**2 / torch.diag(factor).reshape(1, -1) ** 2
        mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * sparsity) - 1]
        for i in range(stop - start):
            column, d = part[:, i], factor[i, i]
            kept = column.clone()
            kept[mask[:, i]] = 0
            new[:, i] = kept
            error = (column - kept) / d
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, start:stop] = new
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return w


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--refined", action="store_true", help="time the refined solver too")
    a = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(a.rows, a.columns) / a.columns**0.5
    x = torch.randn(a.columns + 1024, a.columns // 4) @ torch.randn(a.columns // 4, a.columns)
    x = x / (a.columns // 4) ** 0.5 + 0.5 * torch.randn(a.columns + 1024, a.columns)
    hessian = x.T @ x / len(x)
    print(machine(), f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    calls = {
        "original": lambda: original(weight, hessian, a.sparsity),
        "ours": lambda: sparsegpt.solve(weight, hessian, sparsity=a.sparsity, refine=None).weight,
    }
    if a.refined:
        calls["ours, back-solve"] = lambda: (
            sparsegpt.solve(weight, hessian, sparsity=a.sparsity, search=0).weight
        )
        calls["ours, refined"] = lambda: (
            sparsegpt.solve(weight, hessian, sparsity=a.sparsity).weight
        )
    seconds, errors = {name: [] for name in calls}, {}
    for _ in range(a.runs):
        for name, call in calls.items():
            begin = time.perf_counter()
            new = call()
            seconds[name].append(time.perf_counter() - begin)
            errors[name] = relative_error(weight, new, hessian)
    base = median(seconds["original"])
    print(f"{a.rows}x{a.columns} at {a.sparsity}: seconds, speed, error over the original's")
    for name in calls:
        took = median(seconds[name])
        print(f"  {name:18s}{took:8.2f}{base / took:8.2f}x{errors[name] / errors['original']:9.4f}")


if __name__ == "__main__":
    main()
