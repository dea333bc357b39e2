"""What an attention call carries beside q, k and v: one list for schema, api and backends."""

from typing import NamedTuple

SCHEMA = "int window_left, int window_right, float softmax_scale"


class Options(NamedTuple):
    """The arguments of `SCHEMA`, in its order.

    window_left, window_right: query i sees keys from i + seqlen_k - seqlen_q - window_left to
        i + seqlen_k - seqlen_q + window_right; -1 is unbounded, causal is window_right 0.
    """

    window_left: int
    window_right: int
    softmax_scale: float
