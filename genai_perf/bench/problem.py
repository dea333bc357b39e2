"""What is measured: one case of an op in one phase, and the variants that can compute it."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch

from .._dispatch import explain

Outputs = Mapping[str, torch.Tensor]


class Unsupported(ValueError):
    """A peer cannot compute this problem; the message says why, in one sentence."""


@dataclass(frozen=True)
class Problem:
    """One case of an op in one phase, with its inputs.

    inputs: by name, on `device`; what each is, the op's suite says.
    flops, floor_bytes: in closed form: arithmetic without waste, and each input and output once.
    options: what the suite and the peers must know beside the tensors.
    memo: what `once` has computed.
    """

    op: str
    case: str
    phase: str
    device: str
    dtype: torch.dtype
    inputs: Mapping[str, object]
    flops: int
    floor_bytes: int
    options: Mapping[str, object] = field(default_factory=dict)
    memo: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    def clone(self) -> "Problem":
        """The same numbers at other addresses."""
        return replace(self, inputs=copy.deepcopy(dict(self.inputs)), memo={})

    def once(self, name: str, compute: Callable[[], object]) -> object:
        """What `compute` gives, computed once for all variants: the oracle, say."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]


@dataclass(frozen=True)
class Variant:
    """One way to compute a problem.

    call: what is timed.
    result: from what `call` returns to named outputs in the op's own layout; not timed.
    numerics: the type it rounds activations to on purpose, where that is not the problem's dtype:
        "bfloat16", "float16", "fp8", "int8" or "int7"; its error is judged by that type's.
    weight: the dense weight it holds, where its format is not the problem's own.
    """

    call: Callable[[], object]
    result: Callable[[object], Outputs]
    numerics: str | None = None
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class Check:
    """Largest error against the float64 oracle, and what the numerics rule allows."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def join(checks: list[Check]) -> Check:
    """The worst of several outputs: the one that comes nearest to its bound, or passes it."""

    def strain(check: Check) -> float:
        if math.isnan(check.error):
            return math.inf
        return check.error / check.allowed if check.allowed else math.inf * bool(check.error)

    return max(checks, key=strain)


def choose(what: str, wanted: str, known: list[str] | tuple[str, ...]) -> str:
    """`wanted` if it is known.

    Raises:
        ValueError: it is not; offers the nearest names.
    """
    if wanted in known:
        return wanted
    plain = {name.casefold(): name for name in known}
    near = [plain[name] for name in get_close_matches(wanted.casefold(), plain, n=3, cutoff=0.4)]
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    raise ValueError(f"bench: no {what} is named {wanted!r}{hint}")


def asked(backend: str | None, function: Callable, *args, **kwargs) -> str | None:
    """The `backend` to name in a call: none where the call takes this one anyway, as a user's does,
    which may then reach the kernel without the op around it."""
    chosen = None if backend is None else explain(function, *args, **kwargs).backend
    return None if chosen == backend else backend
