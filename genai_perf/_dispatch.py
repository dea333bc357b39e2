"""Op: one schema, one fake, and the choice of a backend for each call.

An op lives in a package `genai_perf.ops.<op>`; its backends are modules of that package, named
after the backend, each with `why_not(*args) -> str | None` and `forward(*args)` (and, for the
backward op, `why_not_backward` and `backward`). They are imported when first considered.

Registered with torch's low-level Library class: 4 us a call where its custom_op decorator costs 12
(measured on a 2-core VM), and opaque to torch.compile all the same. A call on plain tensors that
nothing watches (no tracing, no transform, no mode, no profiler) skips torch's dispatcher, another
4 us; where gradients are wanted it is a torch.autograd.Function of our own: 20 us a call, and 70
through the library's autograd.
"""

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import torch
from torch import library as torch_library
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from ._backends import native
from ._config import CONFIG
from ._errors import BackendUnsupported

# Every backend that some op has; "semi_structured" is torch's own kernel.
BACKENDS = ("cuda", "semi_structured", "triton", "nki", "native", "reference")
LIBRARY = torch_library.Library("genai_perf", "DEF")
_NATIVE_FIRST = CONFIG.backend in (None, "native") and not CONFIG.triton_interpret
_explaining: ContextVar[bool] = ContextVar("genai_perf_explaining", default=False)


def unwatched() -> bool:
    """Whether nobody but autograd could want to see a call: torch's dispatcher can be left out."""
    return not (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or _explaining.get()
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """No subclass, no fake or meta tensor, no view that negates lazily."""
    kind = type(tensor)
    return (kind is torch.Tensor or kind is Parameter) and not (tensor.is_meta or tensor.is_neg())


def native_first() -> bool:
    """Whether native is asked before any other backend and its function can be called without the
    op around it, if it takes the call."""
    return _NATIVE_FIRST and unwatched()


def goes_direct(*tensors: torch.Tensor) -> bool:
    """Whether native's own function can be called in the place of an op that names no backend:
    plain CPU tensors that want no gradient, nobody watches, and no other backend comes first."""
    if not native_first():
        return False
    wants_grad = torch.is_grad_enabled()
    for t in tensors:
        if not (type(t) is torch.Tensor or type(t) is Parameter) or not t.is_cpu or t.is_neg():
            return False
        if wants_grad and t.requires_grad:
            return False
    return native.unavailable() is None


def has_tangent(*values: object) -> bool:
    """Whether a tensor among them carries a forward-mode derivative of the level that is open."""
    return forward_ad._current_level >= 0 and any(
        isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None
        for x in values
    )


@dataclass(frozen=True)
class Explanation:
    """What one call would run, and for each backend why it would not (None: it would)."""

    op: str
    backend: str
    reasons: dict[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        for name, reason in self.reasons.items():
            mark = "runs" if name == self.backend else "could run" if reason is None else "no"
            lines.append(f"  {name:<10} {mark}{': ' + reason if reason else ''}")
        return "\n".join(lines)


class _Explained(BaseException):
    def __init__(self, explanation: Explanation):
        self.explanation = explanation


class Op:
    """One operation with several backends.

    Args:
        package: the op's package, `__package__` of its api.py.
        name: the name under torch.ops.genai_perf.
        schema: arguments and returns in torch's schema language, functional, ending in
            `*, str? backend=None` (keyword-only: the dispatcher drops trailing positional
            arguments that equal their default).
        fake: output metadata from input metadata, for torch.compile.
        backends: names in order of preference, the last one "reference".
        entry: the function that a backend module exports, "forward" or "backward".
    """

    def __init__(self, package: str, name: str, schema: str, *, fake: Callable,
                 backends: tuple[str, ...], entry: str = "forward"):  # fmt: skip
        self.name, self.package, self.backends, self.entry = name, package, backends, entry
        self._why_not = "why_not" if entry == "forward" else f"why_not_{entry}"
        self._warned = False
        self._modules: dict[str, ModuleType] = {}
        self._function: type[torch.autograd.Function] | None = None
        self._differentiates = False
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch_library.register_fake(f"genai_perf::{name}", fake, lib=LIBRARY)
        self._overload = getattr(torch.ops.genai_perf, name).default

    def __call__(self, *args, backend: str | None = None):
        if not is_compiling():
            if _explaining.get():
                raise _Explained(self.explain(*args, backend=backend))
            if has_tangent(*args):
                return self._forward_mode(*args, backend=backend)
        if unwatched():
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if all(map(is_plain, tensors)):
                if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
                    return self._run(*args, backend=backend)
                if self._function is not None:
                    return self._function.apply(*args, backend)
        return self._overload(*args, backend=backend)

    def register_autograd(self, backward: Callable, *, setup_context: Callable,
                          of_reference: bool = False) -> None:  # fmt: skip
        """`of_reference`: torch's derivative of the reference is the same, so that it serves
        forward-mode (where x is rounded it is not: that would be zero)."""
        self._differentiates = of_reference
        torch_library.register_autograd(
            f"genai_perf::{self.name}", backward, setup_context=setup_context, lib=LIBRARY
        )
        self._function = _function(self._run, backward, setup_context)

    def _forward_mode(self, *args, backend: str | None):
        """By torch's own operations in the reference: an op would lose its tangents."""
        if not self._differentiates:
            raise NotImplementedError(f"{self.name}: has no forward-mode derivative (jvp), got a "
                                      "tensor with a tangent")  # fmt: skip
        if backend not in (None, "reference"):
            raise BackendUnsupported(f"{self.name}: forward-mode derivatives (jvp) come from the "
                                     f"reference, got backend {backend!r}")  # fmt: skip
        return getattr(self._module("reference"), self.entry)(*args)

    def _module(self, backend: str) -> ModuleType:
        if backend not in self._modules:
            self._modules[backend] = import_module(f"{self.package}.{backend}")
        return self._modules[backend]

    def why_not(self, backend: str, args: tuple) -> str | None:
        return getattr(self._module(backend), self._why_not)(*args)

    def explain(self, *args, backend: str | None = None) -> Explanation:
        reasons = {name: self.why_not(name, args) for name in self.backends}
        return Explanation(self.name, self._choose(args, backend, quiet=True), reasons)

    def _choose(self, args: tuple, backend: str | None, *, quiet: bool = False) -> str:
        if backend is not None:
            if backend in BACKENDS and backend not in self.backends:
                raise BackendUnsupported(f"{self.name}: {backend} has no kernel for it, "
                                         f"only {', '.join(self.backends)}")  # fmt: skip
            if backend not in self.backends:
                raise ValueError(f"{self.name}: backend must be one of "
                                 f"{', '.join(self.backends)}, got {backend!r}")  # fmt: skip
            if (reason := self.why_not(backend, args)) is not None:
                raise BackendUnsupported(f"{self.name}: {reason}")
            return backend
        reasons = {}
        preferred = (CONFIG.backend,) if CONFIG.backend in self.backends else ()
        for name in preferred + self.backends:
            unasked = None if name in preferred else _unasked(name, args)
            reasons[name] = unasked or self.why_not(name, args)
            if reasons[name] is None:
                if name == "reference" and name not in preferred and not quiet:
                    self._warn(args, reasons)
                return name
        raise BackendUnsupported(f"{self.name}: no backend runs this call: {_sentence(reasons)}")

    def _warn(self, args: tuple, reasons: dict[str, str | None]) -> None:
        """Said once: the slow reference runs on an accelerator, or for want of the extension."""
        accelerated = any(isinstance(a, torch.Tensor) and a.device.type != "cpu" for a in args)
        if not self._warned and (accelerated or native.unavailable()):
            self._warned = True
            warnings.warn(f"genai_perf.{self.name} runs its slow reference: {_sentence(reasons)}",
                          stacklevel=4)  # fmt: skip

    def _run(self, *args, backend: str | None = None):
        chosen = self._choose(args, backend)
        return getattr(self._module(chosen), self.entry)(*args)


def _unasked(backend: str, args: tuple) -> str | None:
    """Why a backend that could run is not chosen by itself, or None."""
    if backend != "nki":
        return None
    first = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if first is None or first.device.type == "cpu":
        return "nki runs on the CPU, in an interpreter or simulator, only where it is named"
    return None


def _function(run: Callable, derivative: Callable, setup: Callable) -> type:
    """The same derivative as a torch.autograd.Function; its last argument is the backend."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = run(*args[:-1], backend=args[-1])
            setup(ctx, args[:-1], {"backend": args[-1]}, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return (*_as_tuple(derivative(ctx, *grads)), None)

    return Function


def _as_tuple(x: object) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def _sentence(reasons: dict[str, str | None]) -> str:
    return "; ".join(reason for reason in reasons.values() if reason)


def explain(op: Callable, *args, **kwargs) -> Explanation:
    """Which backend `op(*args, **kwargs)` would run, and why the others would not.

    Args:
        op: a public function of genai_perf, such as `genai_perf.attention`, or an `Op`.

    Returns:
        Explanation: printed by `print`, with `.backend` and `.reasons`. Nothing is computed beyond
        the argument checks.
    """
    token = _explaining.set(True)
    try:
        op(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _explaining.reset(token)
    raise ValueError(
        f"explain: {getattr(op, '__name__', op)!r} runs no genai_perf op on these arguments"
    )
