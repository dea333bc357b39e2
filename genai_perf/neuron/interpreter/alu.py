"""The operators and activation functions: what they compute, and where they are allowed.

Arithmetic is fp32. Activations are exact here where the device has piecewise polynomials; outside
the range that the device covers they are refused.
"""

from dataclasses import dataclass

import numpy as np

from .errors import refuse


@dataclass(frozen=True, eq=False)
class Op:
    """An ALU operator. kind: "arithmetic", "bits" (integers) or "unary"; `reduces`: may reduce."""

    name: str
    run: object
    kind: str = "arithmetic"
    reduce: object = None
    since: int = 2

    def __repr__(self) -> str:
        return f"nl.{self.name}"

    def __call__(self, *args, **options):
        from .convenience import elementwise

        return elementwise(self, *args, **options)


@dataclass(frozen=True, eq=False)
class Activation:
    """A function of the Scalar engine, good for low <= x <= high (`symmetric`: of |x|)."""

    name: str
    run: object
    low: float = -np.inf
    high: float = np.inf
    symmetric: bool = False

    def __repr__(self) -> str:
        return f"nl.{self.name}"

    def __call__(self, x, **options):
        from .convenience import activated

        return activated(self, x, **options)

    def check(self, x: np.ndarray) -> None:
        y = np.abs(x) if self.symmetric else x
        bad = (y < self.low) | (y > self.high)
        if self.low > -np.inf or self.high < np.inf:
            bad &= ~np.isnan(x)
            if bad.any():
                refuse(f"{self!r} of {x[bad].flat[0]:g} is outside the device's range "
                       f"[{self.low:g}, {self.high:g}]")  # fmt: skip


def _truth(function):
    return lambda a, b: function(a, b).astype(np.float32)


def _logical(function):
    return lambda a, b: function(np.not_equal(a, 0), np.not_equal(b, 0)).astype(np.float32)


def _shift(function):
    def run(a, b):
        return function(a, np.asarray(b).astype(a.dtype, copy=False))

    return run


def _bits(function):
    def run(a, b):
        a = np.asarray(a)
        info = np.iinfo(a.dtype)
        if np.isscalar(b) and not info.min <= b <= info.max:
            b &= (1 << info.bits) - 1
            return function(a.view(f"u{a.itemsize}"), np.asarray(b, f"u{a.itemsize}")).view(a.dtype)
        return function(a, np.asarray(b).astype(a.dtype, copy=False))

    return run


def _fold(function):
    return lambda x: function(x, axis=-1)


OPS = {
    op.name: op
    for op in (
        Op("add", np.add, reduce=_fold(np.sum)),
        Op("subtract", np.subtract, reduce=lambda x: x[..., 0] - x[..., 1:].sum(-1)),
        Op("multiply", np.multiply, reduce=_fold(np.prod)),
        Op("maximum", np.maximum, reduce=_fold(np.max)),
        Op("minimum", np.minimum, reduce=_fold(np.min)),
        Op("equal", _truth(np.equal)),
        Op("not_equal", _truth(np.not_equal)),
        Op("greater", _truth(np.greater)),
        Op("greater_equal", _truth(np.greater_equal)),
        Op("less", _truth(np.less)),
        Op("less_equal", _truth(np.less_equal)),
        Op("logical_and", _logical(np.logical_and),
           reduce=lambda x: (x != 0).all(-1).astype(np.float32)),
        Op("logical_or", _logical(np.logical_or),
           reduce=lambda x: (x != 0).any(-1).astype(np.float32)),
        Op("logical_xor", _logical(np.logical_xor)),
        Op("power", np.power),
        Op("abs_max", lambda a, b: np.maximum(np.abs(a), np.abs(b)), since=4,
           reduce=lambda x: np.abs(x).max(-1)),
        Op("abs_min", lambda a, b: np.minimum(np.abs(a), np.abs(b)), since=4,
           reduce=lambda x: np.abs(x).min(-1)),
        Op("bitwise_and", _bits(np.bitwise_and), "bits", _fold(np.bitwise_and.reduce)),
        Op("bitwise_or", _bits(np.bitwise_or), "bits", _fold(np.bitwise_or.reduce)),
        Op("bitwise_xor", _bits(np.bitwise_xor), "bits", _fold(np.bitwise_xor.reduce)),
        Op("invert", lambda a, b: np.invert(a), "bits"),
        Op("left_shift", _shift(np.left_shift), "bits"),
        Op("right_shift", _shift(lambda a, b: np.right_shift(
            a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}")).view(a.dtype)), "bits"),
    )
}  # fmt: skip
# Without a second operand, as op0 of tensor_scalar.
UNARY = {
    "abs": np.abs,
    "square": np.square,
    "relu": lambda x: np.maximum(x, 0),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
}
UNARY_SINCE = {"square": 4, "relu": 4}


def _erf(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softplus(x):
    return np.logaddexp(0, x)


def _gelu(x):
    return 0.5 * x * (1 + _erf(x * np.float32(0.5**0.5)))


def _gelu_dx(x):
    density = np.exp(-0.5 * x * x) * np.float32((2 * np.pi) ** -0.5)
    return 0.5 * (1 + _erf(x * np.float32(0.5**0.5))) + x * density


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + 0.044715 * x**3)))


def _silu_dx(x):
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


ACTIVATIONS = {
    function.name: function
    for function in (
        Activation("copy", lambda x: x),
        Activation("identity", lambda x: x),
        Activation("square", np.square),
        Activation("sigmoid", _sigmoid),
        Activation("relu", UNARY["relu"]),
        Activation("gelu", _gelu),
        Activation("gelu_dx", _gelu_dx),
        Activation("gelu_apprx_tanh", _gelu_tanh),
        Activation("gelu_apprx_sigmoid", lambda x: x * _sigmoid(np.float32(1.702) * x)),
        Activation("silu", lambda x: x * _sigmoid(x)),
        Activation("silu_dx", _silu_dx),
        Activation("tanh", np.tanh),
        Activation("softplus", _softplus),
        Activation("mish", lambda x: x * np.tanh(_softplus(x))),
        Activation("erf", _erf),
        Activation("erf_dx", lambda x: np.float32(2 / np.pi**0.5) * np.exp(-x * x)),
        Activation("exp", np.exp),
        Activation("sign", np.sign),
        Activation("abs", np.abs),
        Activation("log", np.log, 2.0**-64, 2.0**64),
        Activation("sqrt", np.sqrt, 2.0**-116, 2.0**118),
        Activation("rsqrt", UNARY["rsqrt"], 2.0**-87, 2.0**97),
        Activation("reciprocal", UNARY["reciprocal"], 2.0**-42, 2.0**42, symmetric=True),
        Activation("sin", np.sin, -np.pi - 1e-5, np.pi + 1e-5),
        Activation("arctan", np.arctan, -np.pi / 2, np.pi / 2),
    )
}


def operator(instruction: str, name: str, op) -> Op:
    """The Op that a kernel passed; `nl.rsqrt` and its like are activations and operators."""
    if isinstance(op, Op):
        return op
    if isinstance(op, Activation) and op.name in UNARY:
        run = UNARY[op.name]
        return Op(op.name, lambda a, b: run(a), "unary", since=UNARY_SINCE.get(op.name, 2))
    refuse(f"{instruction}: {name} must be an operator of nl, such as nl.add, got {op!r}")


def reducer(instruction: str, name: str, op) -> Op:
    op = operator(instruction, name, op)
    if op.reduce is None:
        refuse(f"{instruction}: {op!r} does not reduce")
    return op


def activation(instruction: str, op) -> Activation:
    if not isinstance(op, Activation):
        refuse(f"{instruction}: op must be an activation of nl, such as nl.exp, got {op!r}")
    return op
