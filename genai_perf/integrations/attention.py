"""`attn_implementation="genai_perf"` for transformers models, and what `attention` makes of it.

Honoured: padding, packed sequences (by position_ids, and by cu_seq_lens_q and _k), sliding windows,
softcap, sinks (s_aux), dropout, additive position bias with its gradient, 4-D masks of bools or to
add, static and dynamic caches, cross attention, autocast. Anything else raises ValueError.
"""

import sys
from functools import lru_cache

import torch
from torch.compiler import is_compiling

from .._checks import fail
from ..ops.attention import attention
from ..ops.decode_attention import decode_attention
from ..ops.decode_attention.native import direct
from .masks import Packing, RuleMask, mask, pack_sequences

NAME = "genai_perf"
_WHERE = "attn_implementation='genai_perf'"
# What eager attention functions of transformers take, and this one honours or has no use for:
# windows are in the masks.
_KNOWN = {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "s_aux",
    "position_bias", "sliding_window", "is_causal", "kwargs",
}  # fmt: skip
_REFUSED = frozenset(("output_attentions", "cache"))


def register() -> None:
    """Make the name known to transformers, for attention and for masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
           softcap=None, s_aux=None, position_bias=None, sliding_window=None, cu_seq_lens_q=None,
           cu_seq_lens_k=None, max_length_q=None, max_length_k=None, position_ids=None,
           **kwargs):  # fmt: skip
    """Attention of query (batch, nheads, q_length, headdim) over key and value (batch, nheads_k,
    kv_length, headdim), as transformers models call it: (out (batch, q_length, nheads, headdim),
    None)."""
    _refuse(module, s_aux, kwargs)
    alone = attention_mask is None is position_bias and cu_seq_lens_q is None is cu_seq_lens_k
    one = alone and not dropout and query.dim() == 4 and query.shape[2] == 1
    if one and not torch.is_autocast_enabled("cpu"):
        found = direct(query, key, value, key.shape[2], (-1, -1), scaling, softcap or 0.0,
                       sinks=s_aux, heads_first=True)  # fmt: skip
        if found:
            return found[0], None
    q, k, v = _in_one_dtype(query, key, value)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.shape[0] == 1 != k.shape[0]:  # learned queries, the same for the whole batch
        q = q.expand(k.shape[0], -1, -1, -1)
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux,
               "dropout_p": dropout}  # fmt: skip
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        packing = _given(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, q, k)
        if packing is None and causal:
            packing = _restarting(position_ids, q, k)
        if packing is None:
            return _whole(q, k, v, causal and q.shape[1] > 1, position_bias, options), None
        window = (None, 0 if causal else None)
        if sliding_window is not None and causal:
            window = (sliding_window - 1, 0)
        return _packed(packing, q, k, v, position_bias, window, options), None
    if attention_mask.dim() != 4:
        fail(_WHERE, "attention_mask", "4-D, or None", f"shape {tuple(attention_mask.shape)}")
    if not isinstance(attention_mask, RuleMask):
        if cu_seq_lens_q is not None:
            fail(_WHERE, "attention_mask", "None beside cu_seq_lens_q", "one of 4 dimensions")
        return attention(q, k, v, attn_bias=_joined(position_bias, attention_mask), **options), None
    if attention_mask.rule.sequences is None and attention_mask.rule.right == 0:
        # Some models, GPT-OSS among them, do not tell their masks about packed sequences.
        packing = _given(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, q, k)
        if packing is not None and attention_mask.keys is not None:
            fail(_WHERE, "attention_mask", "None beside cu_seq_lens_q", "one with padding")
        if packing is None and attention_mask.keys is None:
            packing = _restarting(position_ids, q, k)
        if packing is not None:
            window = (attention_mask.rule.left, 0)
            return _packed(packing, q, k, v, position_bias, window, options), None
    return _by_rule(attention_mask, q, k, v, position_bias, options), None


def _refuse(module, s_aux, kwargs: dict) -> None:
    meant = _meant_for_eager.__wrapped__ if is_compiling() else _meant_for_eager
    names = meant(type(module).__module__)
    if s_aux is None and "sinks" in getattr(module, "_parameters", ()):
        fail(_WHERE, "s_aux", f"the sinks of {type(module).__name__}", None)
    if names.isdisjoint(kwargs):
        return
    if kwargs.get("output_attentions"):
        fail(_WHERE, "output_attentions", "False (weights are never formed: use eager)", True)
    if kwargs.get("cache") is not None:
        fail(_WHERE, "cache", "None (continuous batching is not supported)",
             type(kwargs["cache"]).__name__)  # fmt: skip
    for name in names - _REFUSED:
        if kwargs.get(name) is not None:
            fail(_WHERE, name, f"None (not known how {type(module).__name__} uses it)", "a value")


@lru_cache(maxsize=256)
def _meant_for_eager(model_file: str) -> frozenset[str]:
    """What the model's own eager attention takes by name and `attend` knows nothing of, and what
    it refuses from any model."""
    eager = getattr(sys.modules.get(model_file), "eager_attention_forward", None)
    if eager is None:
        return _REFUSED
    code = eager.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return _REFUSED.union(name for name in names if name not in _KNOWN)


def _in_one_dtype(query, key, value):
    """Under autocast its dtype, as for torch's own attention; else as they are."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _whole(q, k, v, causal: bool, bias, options: dict):
    """No mask: all keys, or causal from the first key on (keys past the queries are empty slots of
    a static cache)."""
    if causal and k.shape[1] > q.shape[1]:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        bias = None if bias is None else bias[..., : q.shape[1]]
    if bias is None and _is_decoding(q, k, options):
        return _decode(q, k, v, options)
    return attention(q, k, v, causal=causal, attn_bias=bias, **options)


def _is_decoding(q, k, options: dict) -> bool:
    """One query, for `decode_attention`, which has no backward."""
    return (
        q.shape[1] == 1
        and not torch.compiler.is_compiling()
        and q.is_cpu
        and not options["dropout_p"]
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    )


def _decode(q, k, v, options: dict, window=(None, None), left_padding=None):
    options = {name: value for name, value in options.items() if name != "dropout_p"}
    return decode_attention(q, k, v, cache_seqlens=k.shape[1], cache_leftpad=left_padding,
                            window_size=window, **options)  # fmt: skip


def _by_rule(rules: RuleMask, q, k, v, bias, options: dict):
    rule = rules.rule
    if rules.shape[-2] != q.shape[1] or rules.shape[-1] != k.shape[1]:
        fail(_WHERE, "attention_mask", f"(batch, 1, {q.shape[1]}, {k.shape[1]})",
             tuple(rules.shape))  # fmt: skip
    end, window = rules.visible, (rule.left, rule.right)
    if rules.keys is None and rule.sequences is None and rules.aligned:
        if end < k.shape[1]:
            k, v, bias = k[:, :end], v[:, :end], None if bias is None else bias[..., :end]
        if bias is None and _is_decoding(q, k, options):
            return _decode(q, k, v, options, window)
        return attention(q, k, v, window_size=window, attn_bias=bias, **options)
    seen_k, seen_v = k[:, :end], v[:, :end]
    picks = rules.keys is not None or rule.sequences is not None
    if bias is None and q.shape[1] == 1:  # packing would copy the whole cache for one query
        padded = rules.keys is not None and rules.aligned and _is_decoding(q, seen_k, options)
        if padded and rules.left_padding is not None:
            return _decode(q, seen_k, seen_v, options, window, rules.left_padding)
    elif bias is None and picks and rules.packing is not None:
        return _packed(rules.packing, q, seen_k, seen_v, None, window, options)
    return attention(q, k, v, attn_bias=_joined(bias, rules.dense), **options)


def _given(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, q, k) -> Packing | None:
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        fail(_WHERE, "cu_seq_lens_q and cu_seq_lens_k", "given together", "one of them")
    return Packing(
        None,
        None,
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        q.shape[0] * q.shape[1] if max_length_q is None else int(max_length_q),
        k.shape[0] * k.shape[1] if max_length_k is None else int(max_length_k),
    )


def _restarting(position_ids, q, k) -> Packing | None:
    """One row whose positions start anew holds several sequences."""
    one = position_ids is not None and position_ids.dim() == 2 and len(position_ids) == 1
    if not one or len(q) != 1 or q.shape[1] == 1 or q.shape[1] != k.shape[1]:
        return None
    if position_ids.shape[1] != q.shape[1] or torch.compiler.is_compiling():
        return None
    new = position_ids.diff() != 1
    return pack_sequences(torch.nn.functional.pad(new.cumsum(-1), (1, 0))) if new.any() else None


def _packed(packing: Packing, q, k, v, bias, window: tuple, options: dict):
    """The rows that take part, as packed sequences; the other rows of the result are 0."""
    if bias is not None:
        fail(_WHERE, "position_bias", "None with packed sequences", "a tensor")
    shape = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if packing.rows_k is not None:
        k, v = k.index_select(0, packing.rows_k), v.index_select(0, packing.rows_k)
    if packing.rows_q is not None:
        q = q.index_select(0, packing.rows_q)
    out = attention(
        q,
        k,
        v,
        window_size=window,
        cu_seqlens_q=packing.cu_seqlens_q,
        cu_seqlens_k=packing.cu_seqlens_k,
        max_seqlen_q=packing.max_seqlen_q,
        max_seqlen_k=packing.max_seqlen_k,
        **options,
    )
    if packing.rows_q is not None:
        room = out.new_zeros(shape[0] * shape[1], *out.shape[1:])
        out = room.index_copy(0, packing.rows_q, out)
    return out.unflatten(0, shape)


def _joined(bias, dense):
    """Bias and mask in one tensor to add, or the mask alone."""
    if bias is None:
        return dense
    if dense.dtype == torch.bool:
        return torch.where(dense, bias, -torch.inf)
    return bias + dense
