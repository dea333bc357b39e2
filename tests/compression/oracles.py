"""SparseGPT and GPTQ in float64 numpy from the papers' text: one column at a time, the inverse
Hessian reduced by Gaussian elimination, no blocks of updates and no Cholesky factor."""

import numpy as np
import torch


def damped(hessian, damp_frac):
    hessian = np.asarray(hessian).astype(np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    return hessian + damp_frac * np.diag(hessian).mean() * np.eye(len(hessian)), dead


def eliminated_rows(hessian):
    """Row j of the inverse of H over the columns j, j+1, ...: what weight j's error spreads by."""
    inverse = np.linalg.inv(hessian)
    rows = []
    for j in range(len(hessian)):
        rows.append(inverse[j].copy())
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return rows


def lowest(scores, count):
    """The indices of the `count` lowest scores; equal scores by index."""
    return np.lexsort((np.arange(len(scores)), scores))[:count]


def sparsegpt(
    weight, hessian, *, sparsity=None, pattern=None, damp_frac=0.01, block=128, grid=None
):
    """(weight, kept mask); grid: rounds one column, (values, column) -> values."""
    hessian, dead = damped(hessian, 0.01)
    w = np.asarray(weight).astype(np.float64)
    w[:, dead] = 0
    rows_of_inverse = eliminated_rows(hessian)
    variance = np.array([row[j] for j, row in enumerate(rows_of_inverse)])
    rows, columns = w.shape
    kept = np.ones(w.shape, dtype=bool)
    for j in range(columns):
        if pattern is None and j % block == 0:
            stop = min(j + block, columns)
            scores = (w[:, j:stop] ** 2 / variance[j:stop]).reshape(-1)
            mask = np.ones(len(scores), dtype=bool)
            mask[lowest(scores, round(len(scores) * sparsity))] = False
            kept[:, j:stop] = mask.reshape(rows, -1)
        if pattern is not None and j % pattern[1] == 0:
            zeros, group = pattern
            stop = min(j + group, columns)
            for r in range(rows):
                scores = w[r, j:stop] ** 2 / variance[j:stop]
                kept[r, j + lowest(scores, zeros * (stop - j) // group)] = False
        target = np.where(kept[:, j], w[:, j], 0)
        if grid is not None:
            target = grid(target, j)
        spread = rows_of_inverse[j][j:] / variance[j]
        w[:, j:] -= np.outer(w[:, j] - target, spread)
        w[:, j] = target
    return w, kept


def gptq(weight, hessian, *, group_size, fit, damp_frac=0.01, at_group=False, order=None):
    """Rounds all columns; fit: (rows, group columns) -> a function that rounds a column of values.

    at_group: fit on updated weights when the sweep arrives; order: the columns as visited.
    """
    hessian, _ = damped(hessian, damp_frac)
    w = np.asarray(weight).astype(np.float64)
    columns = w.shape[1]
    order = np.arange(columns) if order is None else np.asarray(order)
    rounders = {g: fit(w[:, g : g + group_size]) for g in range(0, columns, group_size)}
    inverse_rows = eliminated_rows(hessian[np.ix_(order, order)])
    for step, j in enumerate(order):
        first = j - j % group_size
        if at_group and j == first:
            rounders[first] = fit(w[:, first : first + group_size])
        target = rounders[first](w[:, j])
        spread = inverse_rows[step][step:] / inverse_rows[step][step]
        w[:, order[step:]] -= np.outer(w[:, j] - target, spread)
        w[:, j] = target
    return w


def minmax(symmetric, bits=4):
    """The covering grid of a group, as compressed-tensors' min-max observer defines it."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def fit(part):
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale, zero = np.maximum(-low, high) * 2 / (high_code - low_code), 0
        else:
            scale = (high - low) / (high_code - low_code)
            scale = scale.astype(np.float32).astype(np.float64)
            zero = np.round(low_code - low / scale)
        scale = np.float64(np.float32(scale))
        return lambda v: (np.clip(np.round(v / scale) + zero, low_code, high_code) - zero) * scale

    return fit


def least_squares(weight, hessian, kept):
    """Row by row, the exact best values of the kept weights for (v - w) H (v - w)^T."""
    # In torch, whose threads the tests limit: a busy machine makes numpy's small solves crawl.
    weight, hessian = torch.as_tensor(weight).double(), torch.as_tensor(hessian).double()
    out = torch.zeros_like(weight)
    for r, row in enumerate(weight):
        index = torch.as_tensor(kept[r]).nonzero()[:, 0]
        out[r, index] = torch.linalg.solve(hessian[index][:, index], hessian[index] @ row)
    return out.numpy()


def error(before, after, hessian):
    delta = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    before, hessian = np.asarray(before, np.float64), np.asarray(hessian, np.float64)
    return ((delta @ hessian) * delta).sum() / ((before @ hessian) * before).sum()
