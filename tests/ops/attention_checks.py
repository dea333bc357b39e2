"""Running an attention call and comparing it with the float64 oracle, for several test files."""

import contextlib
from collections.abc import Iterable
from functools import partial

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.attention import reference
from genai_perf.testing.numerics import assert_close_to_oracle


def leaves(inputs: dict, dtype=None) -> tuple[dict, dict]:
    """A copy of the inputs whose floating-point tensors want gradients, and these tensors."""
    copy = {
        name: x.detach().to(dtype or x.dtype).requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "alibi_slopes"
        else x
        for name, x in inputs.items()
    }
    return copy, {n: x for n, x in copy.items() if isinstance(x, torch.Tensor) and x.requires_grad}


def run(inputs: dict, *, backend: str, dtype=None, seed: int = 1, upstream=None) -> dict:
    """out, lse and the gradients for a random upstream gradient of both, by name."""
    call, wanted = leaves(inputs, dtype)
    out, lse = gp.attention(**call, return_lse=True, backend=backend)
    if upstream is None:
        generator = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
    upstream = [x.to(y) for x, y in zip(upstream, (out, lse), strict=True)]
    grads = torch.autograd.grad((out, lse), list(wanted.values()), upstream)
    named = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named, "upstream": upstream}


def check_oracle(inputs: dict, others: Iterable[dict] = (), backend: str = "native") -> None:
    """A backend by the project's rule.

    The largest error is that of one element, and where the tensor is small, or a few of its
    elements are far larger than the rest, mostly luck. So a call over the bound is judged again
    with one more of `others`, inputs of the same case, and so on to their end: by the rule over
    all of them as one tensor, where our own largest error stays in the count.
    """
    others = iter(others)
    draws = [draw(inputs, backend)]
    while True:
        try:
            return check_draws(draws)
        except AssertionError:
            other = next(others, None)
            if other is None:
                raise
        draws.append(draw(other, backend))


def draw(inputs: dict, backend: str) -> tuple[dict, dict, dict]:
    """What a backend, the float64 oracle and the yardstick give."""
    got = run(inputs, backend=backend)
    for name in got.keys() - {"upstream"}:
        assert got[name].dtype == (torch.float32 if name == "lse" else inputs["q"].dtype)
    return got, *oracle_and_yardstick(inputs, got.pop("upstream"))


def check_draws(draws: list[tuple[dict, dict, dict]]) -> None:
    for name in draws[0][0]:
        whole = (torch.cat([d[name].flatten() for d in kind]) for kind in zip(*draws, strict=True))
        assert_close_to_oracle(*whole, 2 if name in ("out", "lse") else 3, name)


def oracle_and_yardstick(inputs: dict, upstream=None) -> tuple[dict, dict]:
    with same_precision():
        yardstick = run(inputs, backend="reference", upstream=upstream)
    upstream = yardstick["upstream"]
    return run(inputs, backend="reference", dtype=torch.float64, upstream=upstream), yardstick


@contextlib.contextmanager
def same_precision():
    """The reference computing in the dtype of its inputs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(reference, name, partial(getattr(reference, name), upcast=False))
        yield
