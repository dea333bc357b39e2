"""One attention call as the kernels take it: tensors, options, and numbers derived from them."""

import math
from dataclasses import dataclass

import torch

from .common import ADDED_BIAS, BOOL_MASK, NO_BIAS

LOG2E = 1 / math.log(2)
# A tile spans at most this many rows; row offsets inside a tile are 32-bit.
MAX_TILE_ROWS = 256


@dataclass(frozen=True)
class Problem:
    """q, k, v (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens.

    window_left and window_right: distances from the aligned diagonal, None unbounded; causal is
    window_right 0. bias: (batch or 1, nheads or 1, seqlen_q or 1, seqlen_k or 1), floating point to
    be added or bool (True is seen). alibi_slopes: float32 (nheads,) or (batch, nheads). sinks:
    (nheads,), one more logit for each row.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    softmax_scale: float
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1 if self.varlen else self.q.shape[0]

    @property
    def nheads(self) -> int:
        return self.q.shape[-2]

    @property
    def nheads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def group(self) -> int:
        return self.nheads // self.nheads_k

    @property
    def headdim(self) -> int:
        return self.q.shape[-1]

    @property
    def headdim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def seqlen_q(self) -> int:
        return self.max_seqlen_q if self.varlen else self.q.shape[1]

    @property
    def seqlen_k(self) -> int:
        return self.max_seqlen_k if self.varlen else self.k.shape[1]

    @property
    def lse_shape(self) -> tuple[int, ...]:
        if self.varlen:
            return (self.nheads, self.q.shape[0])
        return (self.batch, self.nheads, self.seqlen_q)

    def lse_strides(self) -> tuple[int, int]:
        """(batch, head) of a contiguous tensor of lse_shape."""
        return (0 if self.varlen else self.nheads * self.lse_shape[-1], self.lse_shape[-1])

    def bias_kind(self) -> int:
        if self.bias is None:
            return NO_BIAS.value
        return BOOL_MASK.value if self.bias.dtype == torch.bool else ADDED_BIAS.value

    def bias_and_strides(self) -> tuple[torch.Tensor | None, tuple[int, ...]]:
        """The bias as bytes if bool, and its strides, 0 where it is broadcast."""
        if self.bias is None:
            return None, (0, 0, 0, 0)
        bias = self.bias.view(torch.uint8) if self.bias.dtype == torch.bool else self.bias
        strides = zip(bias.shape, bias.stride(), strict=True)
        return bias, tuple(0 if size == 1 else stride for size, stride in strides)

    def slopes_stride(self) -> int:
        return self.alibi_slopes.stride(0) if self._slopes_by_batch() else 0

    def _slopes_by_batch(self) -> bool:
        return self.alibi_slopes is not None and self.alibi_slopes.dim() == 2

    def features(self) -> dict[str, object]:
        """The constexprs that all kernels over scores share."""
        return {
            "HEAD_DIM": self.headdim,
            "HEAD_DIM_V": self.headdim_v,
            "BLOCK_D": block_dim(self.headdim),
            "BLOCK_DV": block_dim(self.headdim_v),
            "HAS_LEFT": self.window_left is not None,
            "HAS_RIGHT": self.window_right is not None,
            "SOFTCAP": self.softcap != 0,
            "ALIBI": self.alibi_slopes is not None,
            "BIAS": self.bias_kind(),
            "VARLEN": self.varlen,
            "NATURAL": self.natural,
        }

    def window(self) -> tuple[int, int]:
        """left and right, kept so small that sums with them stay in 32 bits."""
        sides = (self.window_left, self.window_right)
        return tuple(0 if side is None else min(side, 2**29) for side in sides)

    @property
    def natural(self) -> bool:
        """Whether scores keep natural units, as `common` says."""
        return self.q.dtype == torch.float32

    def scales(self) -> tuple[float, float]:
        """(qk_scale, softcap) as `common.scores` takes them."""
        if self.softcap:
            return self.softmax_scale / self.softcap, self.softcap
        return self.softmax_scale * (1.0 if self.natural else LOG2E), 0.0

    def scale_first(self) -> bool:
        """Whether scores are scaled before their maximum is taken, and not only the maximum."""
        plain = not self.softcap and self.alibi_slopes is None and self.bias is None
        return not (plain and self.softmax_scale > 0)


def block_dim(dim: int) -> int:
    """The power of two, at least 16 (the least that tl.dot takes), that holds a head dimension."""
    return max(16, 1 << (dim - 1).bit_length())


def rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous or a tile's offsets pass 32 bits."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if dense and x.stride(-3) * MAX_TILE_ROWS < 2**31 else x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch, row, head); the batch stride of a packed tensor is 0."""
    return (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))
