"""The masks of transformers models, kept as rules for as long as nobody reads them.

transformers describes a mask by functions of positions. `mask` recognises the common ones (causal,
bidirectional, sliding windows, padding, packed sequences) and returns a `RuleMask`: a tensor of the
right shape and no content, which attention runs from its rule. Any other use of it, and every mask
that is not recognised, gets the whole matrix of bools: slower, never different.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import CodeType

import torch
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, by the distance of their positions (key minus query).

    left, right: the distance is at least -left and at most right; None is unbounded.
    sequences: int (batch, length), equal where two tokens are of one sequence; None: all are.
    """

    left: int | None = None
    right: int | None = None
    sequences: torch.Tensor | None = None

    def intersect(self, other: "Rule") -> "Rule | None":
        if self.sequences is not None and other.sequences is not None:
            return None
        both = self.sequences if other.sequences is None else other.sequences
        return Rule(_least(self.left, other.left), _least(self.right, other.right), both)


def _least(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


class RuleMask(torch.Tensor):
    """bool (batch, 1, q_length, kv_length), True where a query sees a key, made when it is read."""

    @staticmethod
    def __new__(cls, shape, device, rule, offset, keys, make):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, shape, device, rule: Rule, offset: int, keys: torch.Tensor | None,
                 make: Callable[[], torch.Tensor]):  # fmt: skip
        """offset: position of query 0 minus position of key 0; keys: bool (batch, kv_length), True
        where a key is not padding, None where none is."""
        self.rule, self.offset, self.keys, self._make = rule, offset, keys, make

    @cached_property
    def dense(self) -> torch.Tensor:
        return self._make()

    def __repr__(self):
        return f"RuleMask({tuple(self.shape)}, {self.rule}, offset={self.offset})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda mask: mask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def visible(self) -> int:
        """The end of the keys that any query sees."""
        return _visible(self.rule, self.offset, self.shape[-2], self.shape[-1])

    @property
    def aligned(self) -> bool:
        """Whether the last query and the last visible key stand at one position, as in attention;
        of no matter where distances are unbounded."""
        unbounded = self.rule.left is None and self.rule.right is None
        return unbounded or self.visible - self.shape[-2] == self.offset

    @cached_property
    def left_padding(self) -> torch.Tensor | None:
        """int32 (batch,): how many keys come before the first that is no padding; None where
        padding comes later too."""
        keys = self.keys[:, : self.visible]
        lengths = keys.sum(-1)
        if not bool(keys[:, -1:].all()) or not _in_one_piece(keys, lengths):
            return None
        return (keys.shape[1] - lengths).to(torch.int32)

    @cached_property
    def packing(self) -> "Packing | None":
        """How to run it as packed sequences; None where that cannot express it."""
        batch, _, q_length, kv_length = self.shape
        rule, keys = self.rule, self.keys
        if rule.sequences is not None:
            if keys is not None or self.offset or q_length != kv_length or not self.aligned:
                return None
            return pack_sequences(rule.sequences)
        if not self.aligned:
            return None
        keys = keys[:, : self.visible]
        lengths = keys.sum(-1)
        if rule.left is None and rule.right is None:
            queries = torch.ones(batch, q_length, dtype=torch.bool, device=keys.device)
        elif (rule.left is not None or rule.right) and not _in_one_piece(keys, lengths):
            return None
        elif rule.right == 0:
            queries = keys[:, self.offset :]
        elif self.offset == 0 and q_length == kv_length:
            queries = keys
        else:
            return None
        return _pack(queries, keys)


@dataclass(frozen=True)
class Packing:
    """Rows of the flattened batch that take part, and where sequences begin among them.

    rows_q, rows_k: int64, None where all rows do, in their order.
    """

    rows_q: torch.Tensor | None
    rows_k: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def _in_one_piece(keys: torch.Tensor, lengths: torch.Tensor) -> bool:
    """No padding between the keys of any row."""
    places = torch.arange(1, keys.shape[1] + 1, device=keys.device) * keys
    first = places.masked_fill(~keys, keys.shape[1] + 1).amin(-1)
    return bool(((places.amax(-1) - first + 1 == lengths) | (lengths == 0)).all())


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cumulative[1:])
    return cumulative


def _pack(queries: torch.Tensor, keys: torch.Tensor) -> Packing:
    lengths_q, lengths_k = queries.sum(-1), keys.sum(-1)
    return Packing(
        None if bool(queries.all()) else queries.flatten().nonzero().flatten(),
        keys.flatten().nonzero().flatten(),
        _cumulative(lengths_q),
        _cumulative(lengths_k),
        int(lengths_q.max()),
        int(lengths_k.max()),
    )


def pack_sequences(sequences: torch.Tensor) -> Packing:
    """Sequences end where the number changes and with every row of the batch."""
    starts = torch.ones_like(sequences, dtype=torch.bool)
    starts[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    ends = torch.tensor([sequences.numel()], device=sequences.device)
    cumulative = torch.cat((starts.flatten().nonzero().flatten(), ends))
    longest = int(cumulative.diff().max())
    cumulative = cumulative.to(torch.int32)
    return Packing(None, None, cumulative, cumulative, longest, longest)


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None,
         attention_mask=None, local_size=None, allow_is_causal_skip=True,
         allow_is_bidirectional_skip=False, use_vmap=False, device="cpu", **kwargs):  # fmt: skip
    """The mask function of `attn_implementation="genai_perf"`, called by transformers.

    Returns:
        None where `is_causal` says it all; a RuleMask; or bool (batch, 1, q_length, kv_length).
    """
    from transformers import masking_utils

    decoding = (
        q_length == 1 and mask_function is masking_utils.causal_mask_function
        and attention_mask is None and allow_is_causal_skip and not use_vmap
        and type(q_offset) is int and kv_length == q_offset - kv_offset + 1
    )  # fmt: skip
    if decoding:  # sees every key
        return None

    from transformers.utils.import_utils import is_tracing

    mask_function = mask_function or masking_utils.causal_mask_function

    def dense(skip: bool = False) -> torch.Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            local_size, allow_is_causal_skip=skip and allow_is_causal_skip,
            allow_is_bidirectional_skip=skip and allow_is_bidirectional_skip, use_vmap=use_vmap,
            device=device,
        )  # fmt: skip

    tensors = (x for x in (attention_mask, q_offset) if isinstance(x, torch.Tensor))
    if torch.compiler.is_compiling() or any(map(is_tracing, tensors)):
        return dense(skip=True)
    rule = None if use_vmap else recognise(mask_function)
    if rule is None:
        return dense()
    offset = int(q_offset) - int(kv_offset)
    end = _visible(rule, offset, q_length, kv_length)
    keys = None
    if attention_mask is not None:
        keys = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        keys = keys[:, kv_offset : kv_offset + kv_length].bool()
        keys = None if bool(keys[:, :end].all()) else keys
    if keys is None and rule.sequences is None:
        inside = rule.left is None or rule.left >= end - 1
        if rule.right is None and inside and allow_is_bidirectional_skip:
            return None
        whole = end == kv_length and (q_length == 1 or q_length == kv_length)
        if rule.right == 0 and inside and whole and allow_is_causal_skip:
            return None
    if q_length == 1 and not allow_is_causal_skip:  # a compiled step reads it
        return dense()
    return RuleMask((batch_size, 1, q_length, kv_length), device, rule, offset, keys, dense)


def _visible(rule: Rule, offset: int, q_length: int, kv_length: int) -> int:
    """The end of the keys that any query sees."""
    return kv_length if rule.right is None else min(kv_length, offset + q_length + rule.right)


def recognise(function: Callable) -> Rule | None:
    """The rule of a mask function that is one of transformers' own; None: of any other."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is causal_mask_function:
        return Rule(right=0)
    if function is bidirectional_mask_function:
        return Rule()
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    kind = _kinds().get(code)
    if kind is None or closure is None:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in closure), strict=True))
    if kind == "window":
        return Rule(left=held["sliding_window"] - 1)
    if kind == "both sides":
        return Rule(left=held["sliding_window"], right=held["sliding_window"])
    if kind == "sequences":
        return Rule(sequences=held["packed_sequence_mask"])
    if kind == "positions within":  # consecutive within a sequence: distances stay the same
        return recognise(held["mask_function"])
    rule = Rule()
    for part in held["mask_functions"]:
        other = recognise(part)
        rule = None if other is None else rule.intersect(other)
        if rule is None:
            return None
    return rule


@lru_cache(maxsize=1)
def _kinds() -> dict[CodeType, str]:
    """Of the functions that transformers makes masks from, by their code, what each one does.

    One counts only if it holds what `recognise` reads and behaves on an example as is said of it
    here, so that a release that changes one gets the whole matrix instead.
    """
    from transformers import masking_utils

    ids, at = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.arange(6)
    zero, query, key = at[:, None] * 0, at[:, None], at[None]
    distance = key - query
    causal = masking_utils.causal_mask_function
    examples = {
        "window": ("sliding_window_overlay", (3,), "sliding_window", distance > -3),
        "both sides": ("sliding_window_bidirectional_overlay", (2,), "sliding_window",
                       distance.abs() <= 2),
        "sequences": ("packed_sequence_mask_function", (ids,), "packed_sequence_mask",
                      ids == ids.T),
        "positions within": ("remap_positions_for_packed_sequence", (causal, at[None]),
                             "mask_function", distance <= 0),
        "all of": ("and_masks", (causal, masking_utils.bidirectional_mask_function),
                   "mask_functions", distance <= 0),
    }  # fmt: skip
    kinds = {}
    for kind, (maker, arguments, held, wanted) in examples.items():
        make = getattr(masking_utils, maker, None)
        function = None if make is None else make(*arguments)
        if function is not None and held in function.__code__.co_freevars:
            found = function(zero, zero, query, key)
            if torch.equal(found.expand_as(wanted), wanted):
                kinds[function.__code__] = kind
    return kinds
