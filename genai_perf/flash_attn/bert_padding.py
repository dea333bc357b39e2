"""Between padded batches and packed sequences: the functions of flash_attn.bert_padding."""

import torch

from .._checks import check_ndim, check_tensor, fail

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input, indices):
    """Rows `indices`, int64 (n,), of `input` (rows, ...), differentiable: (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values, indices, first_axis_dim):
    """`values` (n, ...) in the rows `indices` of zeros (first_axis_dim, ...), differentiable."""
    room = values.new_zeros(first_axis_dim, *values.shape[1:])
    return room.index_copy(0, indices, values)


def pad_input(hidden_states, indices, batch, seqlen):
    """Packed rows (total, ...) to a padded batch (batch, seqlen, ...), zeros elsewhere.

    Args:
        hidden_states: (total, ...).
        indices: int64 (total,), where each row stands in the flattened batch (`unpad_input`).
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """A padded batch to packed rows.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: bool or int (batch, seqlen), 1 where a token is valid.
        unused_mask: bool or int (batch, seqlen), 1 where room is kept for a token without using it.

    Returns:
        hidden_states (total, ...), indices int64 (total,) of its rows in the flattened batch,
        cu_seqlens int32 (batch + 1,), max_seqlen int, and how many valid tokens each sequence has,
        int32 (batch,).
    """
    _check("unpad_input", hidden_states, attention_mask=attention_mask)
    kept = attention_mask.bool()
    used = kept.sum(-1, dtype=torch.int32)
    if unused_mask is not None:
        _check("unpad_input", hidden_states, unused_mask=unused_mask)
        kept = kept | unused_mask.bool()
    return *_packed(hidden_states, kept, kept.sum(-1, dtype=torch.int32)), used


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """`unpad_input` for batch rows that hold several sequences, one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: int (batch, seqlen): the lengths of the sequences of a row, then
            zeros.

    Returns:
        hidden_states (total, ...), indices int64 (total,), cu_seqlens int32 (sequences + 1,) and
        max_seqlen int.
    """
    name = "unpad_input_for_concatenated_sequences"
    _check(name, hidden_states, attention_mask_in_length=attention_mask_in_length)
    filled = attention_mask_in_length.sum(-1)
    seqlen = hidden_states.shape[1]
    if filled.numel() and int(filled.max()) > seqlen:
        fail(name, "attention_mask_in_length", f"lengths that sum to at most {seqlen} in every row",
             int(filled.max()))  # fmt: skip
    kept = torch.arange(seqlen, device=filled.device) < filled[:, None]
    lengths = attention_mask_in_length[attention_mask_in_length > 0]
    return _packed(hidden_states, kept, lengths)


def _packed(hidden_states, kept, lengths):
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def _check(op: str, hidden_states, **masks) -> None:
    check_tensor(op, hidden_states=hidden_states, **masks)
    check_ndim(op, 2, "(batch, seqlen)", **masks)
    for name, mask in masks.items():
        if hidden_states.shape[:2] != mask.shape:
            fail(op, name, f"(batch, seqlen) {tuple(hidden_states.shape[:2])}", tuple(mask.shape))
