"""The operators: reading the cache, and appending to it in place before reading it."""

from ..._dispatch import Op
from . import reference
from .options import NEW_SCHEMA, SCHEMA

BACKENDS = ("triton", "nki", "native", "reference")


def _fake(q, k_cache, v_cache, *options, backend=None):
    batch, seqlen_q, heads, _ = q.shape
    return (
        q.new_empty(batch, seqlen_q, heads, v_cache.shape[3]),
        q.new_empty(batch, heads, seqlen_q, dtype=reference.lse_dtype(q)),
    )


READ = Op(
    __package__,
    "decode_attention",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, {SCHEMA}, *, str? backend=None)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    backends=BACKENDS,
)
APPEND = Op(
    __package__,
    "decode_attention_append",
    f"(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {NEW_SCHEMA}, {SCHEMA},"
    " *, str? backend=None) -> (Tensor, Tensor)",
    fake=_fake,
    backends=BACKENDS,
    entry="append",
)
