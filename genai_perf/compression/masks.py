"""Which weights to prune, from scores: exact counts, ties to the lower index, old zeros kept.

Masks here are True where a weight is pruned; results of the solvers are True where it is kept.
"""

import re
from dataclasses import dataclass

import torch

from .._checks import fail


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` smallest scores of each row of (rows, n); equal scores go by index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    wanted = count - below.sum(1, keepdim=True)
    return below | (ties & (ties.cumsum(1) <= wanted))


@dataclass(frozen=True)
class Sparsity:
    """An unstructured fraction, or exactly `zeros` zeros in every `group` consecutive inputs.

    Attributes:
        fraction: of the weights, when group is 0.
        zeros, group: the n and m of n:m.
    """

    fraction: float = 0.0
    zeros: int = 0
    group: int = 0

    def choose(self, scores: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Where to prune so that (rows, columns) reaches this sparsity.

        Unstructured: round(rows * columns * fraction) of all, by row-major index where scores are
        equal. n:m: scores are one group's; a last group of r < m columns gets floor(n * r / m)
        zeros, so that it is a valid group once padded with zeros.

        Args:
            scores: (rows, columns), what pruning each weight costs, not negative; rows are compared
                on their own for n:m.
            zero: (rows, columns) bool, the weights that are zero already: they stay zero and count;
                where they are more than asked for, they are the whole answer.
        """
        scores = torch.where(zero, -1.0, scores)
        if self.group:
            chosen = smallest(scores, self.zeros * scores.shape[1] // self.group)
        else:
            count = round(scores.numel() * self.fraction)
            chosen = smallest(scores.reshape(1, -1), count).view(scores.shape)
        return chosen | zero

    def choose_everywhere(
        self, scores: torch.Tensor, zero: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        """`choose` over a whole matrix: in each block of block_size columns when unstructured, in
        each group of each row for n:m.

        Args:
            scores, zero: (rows, columns), as in `choose`.
        """
        rows, columns = scores.shape
        if not self.group:
            parts = zip(scores.split(block_size, 1), zero.split(block_size, 1), strict=True)
            return torch.cat([self.choose(*part) for part in parts], dim=1)
        whole = columns // self.group * self.group
        groups = (t[:, :whole].reshape(-1, self.group) for t in (scores, zero))
        chosen = self.choose(*groups).view(rows, whole)
        if whole == columns:
            return chosen
        return torch.cat([chosen, self.choose(scores[:, whole:], zero[:, whole:])], dim=1)

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}" if self.group else f"{self.fraction:g}"


def parse(op: str, sparsity: float | None, pattern: str | None) -> Sparsity:
    """The one of `sparsity` (0 <= s < 1) and `pattern` ("n:m", 0 < n < m) that the caller gave."""
    if (sparsity is None) == (pattern is None):
        raise ValueError(f"{op}: give one of sparsity and pattern, "
                         f"got sparsity={sparsity!r}, pattern={pattern!r}")  # fmt: skip
    if pattern is None:
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
            fail(op, "sparsity", "a number", repr(sparsity))
        if not 0 <= sparsity < 1:
            fail(op, "sparsity", "at least 0 and below 1", sparsity)
        return Sparsity(fraction=float(sparsity))
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    zeros, group = map(int, match.groups()) if match else (0, 0)
    if not 0 < zeros < group:
        fail(op, "pattern", "n zeros of m as 'n:m' with 0 < n < m, such as '2:4'", repr(pattern))
    return Sparsity(zeros=zeros, group=group)
