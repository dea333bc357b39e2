"""The dropout mask: a pure function of rng_state, batch, head, query and key, on every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11). Keys 4n to
4n + 3 of query i take the four words of the counter (n, i, batch * nheads + head, low word of
offset) under the key (low word of seed, high word of seed xor high word of offset); a probability
is dropped where its word is below dropout_p * 2^32.
"""

import torch

_WORD = 0xFFFFFFFF


def below(dropout_p: float) -> int:
    """The words that drop: those below this number."""
    return min(round(dropout_p * 2**32), _WORD)


def _product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a * b; both in [0, 2^32), the product wraps in int64."""
    wide = a * b
    return (wide >> 32) & _WORD, wide & _WORD


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four int64 tensors of words from four of them and two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def factors(
    rng_state: torch.Tensor,
    dropout_p: float,
    first_stream: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """What each probability is multiplied by: 0 or 1 / (1 - dropout_p).

    Args:
        rng_state: int64 (2,), seed and offset.
        first_stream: batch * nheads + head of the first head in `shape`.
        shape: (batch, nheads, seqlen_q, seqlen_k).
    """
    batch, heads, seqlen_q, seqlen_k = shape
    device = rng_state.device

    def count(n, *after):
        return torch.arange(n, device=device).view(-1, *(1,) * len(after))

    seed, offset = rng_state.unbind()
    groups = (seqlen_k + 3) // 4
    stream = first_stream + count(batch * heads, 1, 1)
    counter = [count(groups), count(seqlen_q, 1), stream, offset & _WORD]
    whole = (batch * heads, seqlen_q, groups)
    counter = [c.expand(whole) for c in counter]
    words = philox(counter, [seed & _WORD, ((seed >> 32) ^ (offset >> 32)) & _WORD])
    words = torch.stack(words, -1).flatten(-2)[..., :seqlen_k]
    return (words >= below(dropout_p)).to(dtype).view(shape) / (1 - dropout_p)
