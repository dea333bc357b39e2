"""Values that cannot be, in one sentence each: labels, top-k ids, top-k probabilities."""

from ..._checks import fail

OP = "distillation loss"
# Probabilities of a top-k teacher that were rounded to fp16 may sum to a little above 1.
MOST_MASS = 1.01


def refuse(code: int, row: int, vocab: int, ids, logprobs, labels) -> None:
    """Raise the sentence of a row error; the codes are those of csrc/cpu/distill_loss.h."""
    if code == 1:
        fail(OP, f"labels[{row}]", f"ignore_index or from 0 to {vocab - 1}", int(labels[row]))
    if code == 2:
        got = "another" if ids is None else ids[row].tolist()
        fail(OP, f"top-k ids of row {row}", f"from 0 to {vocab - 1}", got)
    if code == 3:
        fail(OP, f"top-k ids of row {row}", "all different", "one that repeats")
    mass = logprobs[row].float().exp().sum().item()
    fail(OP, f"top-k probabilities of row {row}", "at most 1 in sum", f"{mass:.4g}")


def check_values(vocab, ids, logprobs, labels, weights) -> None:
    """Raises ValueError where a label, an id or the mass of a row cannot be."""
    live = weights != 0
    if labels is not None:
        bad = live & ((labels < 0) | (labels >= vocab))
        if bad.any():
            refuse(1, int(bad.nonzero()[0]), vocab, ids, logprobs, labels)
    if ids is not None:
        ids = ids[live].long()
        for code, bad in (
            (2, (ids < 0) | (ids >= vocab)),
            (3, ids.sort(-1).values.diff(dim=-1) == 0),
            (4, ~(logprobs[live].float().exp().sum(-1, keepdim=True) <= MOST_MASS)),
        ):
            if bad.any():
                row = int(live.nonzero()[bad.any(-1).nonzero()[0]])
                refuse(code, row, vocab, None, logprobs, labels)
