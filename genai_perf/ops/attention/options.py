"""What an attention call carries beside q, k and v: one list for schema, api and backends."""

from typing import NamedTuple

from torch import Tensor

SCHEMA = (
    "Tensor? attn_bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? block_mask, Tensor? rng_state,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, int window_left, int window_right,"
    " float softmax_scale, float softcap, int block_q, int block_k, float dropout_p"
)


class Options(NamedTuple):
    """The arguments of `SCHEMA`, in its order.

    attn_bias: (1 or batch, 1 or nheads, 1 or seqlen_q, seqlen_k), added to the scores; bool: False
        hides the key; None: none.
    sinks: (nheads,), a score without a value in every softmax of its head; None: none.
    alibi_slopes: float32 (nheads,) or (batch, nheads); the score of query i and key j loses
        slope * |i + seqlen_k - seqlen_q - j|; None: none.
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where packed sequences begin and end; q, k and v
        are (total, nheads, headdim) then. Both or neither.
    block_mask: bool (1 or batch, 1 or nheads, ceil(seqlen_q / block_q), ceil(seqlen_k / block_k));
        a query sees the keys of the blocks where it is True; None: all.
    rng_state: int64 (2,), seed and offset of the dropout mask; None where dropout_p is 0.
    max_seqlen_q, max_seqlen_k: no packed sequence is longer; 0 where they are not packed.
    window_left, window_right: query i sees keys from i + seqlen_k - seqlen_q - window_left to
        i + seqlen_k - seqlen_q + window_right; -1 is unbounded, causal is window_right 0.
    softcap: scores become softcap * tanh(score / softcap); 0: none.
    dropout_p: probability with which a probability becomes 0; the others are divided by 1 - it.
    """

    attn_bias: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    block_mask: Tensor | None
    rng_state: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int
    window_right: int
    softmax_scale: float
    softcap: float
    block_q: int
    block_k: int
    dropout_p: float


# No rule but softmax_scale, which the caller replaces.
PLAIN = Options(
    attn_bias=None,
    sinks=None,
    alibi_slopes=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    block_mask=None,
    rng_state=None,
    max_seqlen_q=0,
    max_seqlen_k=0,
    window_left=-1,
    window_right=-1,
    softmax_scale=1.0,
    softcap=0.0,
    block_q=1,
    block_k=1,
    dropout_p=0.0,
)
# The tensors among them that have a gradient come first.
DIFFERENTIABLE = 2
TENSORS = 7


def present(*tensors: Tensor | None, like: Tensor) -> list[Tensor]:
    """The tensors, an empty one in the place of None: operators return tensors only."""
    return [like.new_empty(0) if x is None else x for x in tensors]
