"""The public `attention`."""

from ..._checks import check_flags, check_softcap, scale_of_scores
from . import checks, native
from .op import FORWARD
from .options import Options


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window_size=(None, None),
    softmax_scale=None,
    softcap=0.0,
    alibi_slopes=None,
    attn_bias=None,
    block_mask=None,
    block_size=(128, 128),
    sinks=None,
    dropout_p=0.0,
    rng_state=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    return_lse=False,
    backend=None,
):
    """Attention with grouped queries, never holding a seqlen_q x seqlen_k matrix (native backend).

        s = softmax_scale * q k^T;  s = softcap * tanh(s / softcap);  s = s + alibi + bias + mask
        out = dropout(softmax(s)) v,   lse = log sum exp of the rows of s

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16 or float16 (float64: reference);
            with cu_seqlens (total_q, nheads, headdim), and k, v, out likewise.
        k: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k, and query head h
            uses key head h // (nheads / nheads_k).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (aligned bottom right).
        window_size: (left, right), query i sees keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right; None is unbounded. causal makes right 0.
        softmax_scale: 1 / sqrt(headdim) by default.
        softcap: bounds the scores to (-softcap, softcap); 0 does not.
        alibi_slopes: float32 (nheads,) or (batch, nheads); the score of query i and key j loses
            slope * |i + seqlen_k - seqlen_q - j|. Has no gradient.
        attn_bias: broadcastable to (batch, nheads, seqlen_q, seqlen_k), added to the scores, with a
            gradient; or of bool: a query sees the keys where it is True.
        block_mask: bool, broadcastable to (batch, nheads, ceil(seqlen_q / block_size[0]),
            ceil(seqlen_k / block_size[1])); a query sees the keys of the blocks where it is True.
            The native backend leaves out what nobody sees before the first and after the last of
            them within each of its own blocks (256 keys by 6 or 12 queries).
        block_size: (queries, keys) of a block of block_mask.
        sinks: (nheads,), a score without a value that takes part in every softmax of its head, and
            in lse.
        dropout_p: in [0, 1); a probability becomes 0 with this one, the others are divided by
            1 - dropout_p. lse is that of the whole softmax. The mask is a function of rng_state,
            batch, head, query and key (`dropout.py`): the same in the backward, on every backend,
            and for a sequence alone or packed at the same place in the batch.
        rng_state: int64 (2,), seed and offset, on the device of q; None draws one from torch's
            generator of that device.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,); rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]
            of q are sequence b, and likewise those of k and v. Both or neither; sequences may be
            empty. Rows past the last sequence give out 0, lse -inf and gradient 0.
        max_seqlen_q, max_seqlen_k: no packed sequence is longer. Kernels on a GPU, which do not
            wait for the values of cu_seqlens, start work for that many rows of each sequence (for
            all rows where it is None), and leave out what lies past it.
        return_lse: also return lse; its gradient is supported.
        backend: "triton", "native" or "reference"; None takes the first that can run the call.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in the dtype of q, and with return_lse also lse
        (batch, nheads, seqlen_q), or (nheads, total_q), float32 (float64 for float64), natural
        logarithm. A query that sees no key gives out 0, lse -inf (its sink, where there is one) and
        gradient 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnsupported: the backend that was named cannot run the call.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), sections 3.1 and 3.2; the words are those of
    the flash-attn package. ALiBi: arXiv 2108.12409. Softcap: Gemma 2 (arXiv 2408.00118). Sinks:
    arXiv 2309.17453, learned as in GPT-OSS (arXiv 2508.10925). Second derivatives come from the
    reference, exact and slow.
    """
    check_flags(checks.OP, causal=causal, return_lse=return_lse)
    left, right = checks.window(window_size)
    if causal:
        right = 0
    plain = (
        backend is None and attn_bias is None and block_mask is None and cu_seqlens_q is None
        and cu_seqlens_k is None and sinks is None and alibi_slopes is None and rng_state is None
        and dropout_p == 0 and block_size == (128, 128)
        and max_seqlen_q is None and max_seqlen_k is None
    )  # fmt: skip
    if plain and (found := native.direct(q, k, v, (left, right), softmax_scale, softcap)):
        return found if return_lse else found[0]
    batch = checks.shapes(q, k, v, cu_seqlens_q, cu_seqlens_k)
    packed = cu_seqlens_q is not None
    softcap = check_softcap(checks.OP, softcap)
    checks.alibi(alibi_slopes, q, batch)
    checks.sinks(sinks, q)
    block_mask, block_q, block_k = checks.blocks(block_mask, block_size, q, k, packed=packed)
    options = Options(
        attn_bias=checks.bias(attn_bias, q, k, packed=packed),
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_mask=block_mask,
        rng_state=checks.dropout(dropout_p, rng_state, q),
        max_seqlen_q=checks.max_seqlen(max_seqlen_q, q, packed, "max_seqlen_q"),
        max_seqlen_k=checks.max_seqlen(max_seqlen_k, k, packed, "max_seqlen_k"),
        window_left=left,
        window_right=right,
        softmax_scale=scale_of_scores(checks.OP, softmax_scale, q.shape[-1]),
        softcap=softcap,
        block_q=block_q,
        block_k=block_k,
        dropout_p=float(dropout_p),
    )
    out, lse = FORWARD(q, k, v, *options, backend=backend)
    return (out, lse) if return_lse else out
