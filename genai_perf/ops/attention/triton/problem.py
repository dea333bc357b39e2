"""One attention call as the kernels take it: tensors, options, and numbers derived from them."""

import math

import torch

from ..dropout import below
from ..options import Options
from .rules import ADDED_BIAS, BOOL_MASK, NO_BIAS, NO_BLOCKS, PARTS_OF_TILES, WHOLE_TILES

LOG2E = 1 / math.log(2)
# The fewest queries or keys of a tile.
LEAST_TILE = 16
# A tile spans at most this many rows; row offsets inside a tile are 32-bit.
MAX_TILE_ROWS = 256


class Problem:
    """q, k, v and `Options` of one call, and the sizes in them.

    Args:
        q, k, v: (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens.
        options: as the operator takes them.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options):
        slopes = options.alibi_slopes
        cu_seqlens = (options.cu_seqlens_q, options.cu_seqlens_k)
        self.q, self.k, self.v, self.options = q, k, v, options
        self.slopes = None if slopes is None else slopes.to(torch.float32).contiguous()
        self.cu_seqlens = tuple(None if cu is None else cu.contiguous() for cu in cu_seqlens)
        self.varlen = options.cu_seqlens_q is not None
        self.nheads, self.headdim = q.shape[-2:]
        self.nheads_k, self.headdim_v = v.shape[-2:]
        self.group = self.nheads // self.nheads_k
        if self.varlen:
            self.batch = options.cu_seqlens_q.shape[0] - 1
            self.seqlen_q, self.seqlen_k = options.max_seqlen_q, options.max_seqlen_k
            self.lse_shape = (self.nheads, q.shape[0])
        else:
            self.batch, self.seqlen_q, self.seqlen_k = q.shape[0], q.shape[1], k.shape[1]
            self.lse_shape = (self.batch, self.nheads, self.seqlen_q)
        # Whether scores keep natural units, as `rules` says.
        self.natural = q.dtype == torch.float32

    def lse_strides(self) -> tuple[int, int]:
        """(batch, head) of a contiguous tensor of lse_shape."""
        return (0 if self.varlen else self.nheads * self.lse_shape[-1], self.lse_shape[-1])

    def bias_kind(self) -> int:
        bias = self.options.attn_bias
        if bias is None:
            return NO_BIAS.value
        return BOOL_MASK.value if bias.dtype == torch.bool else ADDED_BIAS.value

    def blocks_kind(self) -> int:
        """Whether tiles that are made as small as the blocks of the block mask lie within them."""
        o = self.options
        if o.block_mask is None:
            return NO_BLOCKS.value
        parts = min(largest_tile(o.block_q), largest_tile(o.block_k)) < LEAST_TILE
        return PARTS_OF_TILES.value if parts else WHOLE_TILES.value

    def rule_tensors(self) -> tuple[torch.Tensor | None, ...]:
        """bias, slopes, block mask and state of the dropout mask, as the kernels take them."""
        o = self.options
        return _bytes(o.attn_bias), self.slopes, _bytes(o.block_mask), o.rng_state

    def rule_strides(self) -> tuple[int, ...]:
        """Those of the bias, the batch stride of the slopes, then what the block mask has."""
        o, by_batch = self.options, self.slopes is not None and self.slopes.dim() == 2
        return (
            *_strides4(o.attn_bias), self.slopes.stride(0) if by_batch else 0,
            *_strides4(o.block_mask), o.block_q, o.block_k,
        )  # fmt: skip

    def rule_numbers(self) -> tuple[float, ...]:
        """The window (so small that sums with it stay in 32 bits), then dropout."""
        o = self.options
        window = (min(max(side, 0), 2**29) for side in (o.window_left, o.window_right))
        words = below(o.dropout_p)
        return *window, words - 2**32 if words >= 2**31 else words, 1 / (1 - o.dropout_p)

    def features(self) -> dict[str, object]:
        """The constexprs that all kernels over scores share."""
        o = self.options
        return {
            "HEAD_DIM": self.headdim,
            "HEAD_DIM_V": self.headdim_v,
            "BLOCK_D": block_dim(self.headdim),
            "BLOCK_DV": block_dim(self.headdim_v),
            "HAS_LEFT": o.window_left >= 0,
            "HAS_RIGHT": o.window_right >= 0,
            "SOFTCAP": o.softcap != 0,
            "ALIBI": self.slopes is not None,
            "BIAS": self.bias_kind(),
            "BLOCKS": self.blocks_kind(),
            "DROPOUT": o.dropout_p != 0,
            "VARLEN": self.varlen,
            "NATURAL": self.natural,
        }

    def scales(self) -> tuple[float, float]:
        """(qk_scale, softcap) as `rules.scores` takes them."""
        o = self.options
        if o.softcap:
            return o.softmax_scale / o.softcap, o.softcap
        return o.softmax_scale * (1.0 if self.natural else LOG2E), 0.0

    def scale_first(self) -> bool:
        """Whether scores are scaled before their maximum is taken, and not only the maximum."""
        return self.heavy() or self.options.softmax_scale <= 0

    def heavy(self) -> bool:
        """Whether there are rules that need many registers."""
        o = self.options
        parts = self.blocks_kind() == PARTS_OF_TILES.value
        return bool(o.softcap or self.slopes is not None or o.attn_bias is not None or parts)


def block_dim(dim: int) -> int:
    """The power of two, at least 16 (the least that tl.dot takes), that holds a head dimension."""
    return max(16, 1 << (dim - 1).bit_length())


def largest_tile(block: int) -> int:
    """The largest power of two that divides the size of a block."""
    return block & -block


def rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous or a tile's offsets pass 32 bits."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if dense and x.stride(-3) * MAX_TILE_ROWS < 2**31 else x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch, row, head); the batch stride of a packed tensor is 0."""
    return (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def _strides4(x: torch.Tensor | None) -> tuple[int, ...]:
    """0 where it is broadcast."""
    if x is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
