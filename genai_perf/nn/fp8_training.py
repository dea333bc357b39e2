"""Fp8Linear: a trained linear layer whose three products take fp8 codes, straight through."""

from collections.abc import Collection

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .._checks import check_choice, fail
from ..formats import FP8, FP8_E5M2
from ..formats.base import SCALE_FLOOR
from ..formats.fp8 import Fp8

SCALINGS = ("current", "delayed")
_ROLES = ("x", "weight", "grad")


class _Product(torch.autograd.Function):
    """y = x @ weight^T of fp8 codes; codes are all that backward keeps."""

    @staticmethod
    def forward(ctx, x, weight, histories):
        x8, x_scale = _cast(x, FP8, histories[0])
        w8, w_scale = _cast(weight, FP8, histories[1])
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.history, ctx.dtypes = histories[2], (x.dtype, weight.dtype)
        return _multiply(x8, w8.T, x_scale * w_scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        dy8, scale = _cast(dy, FP8_E5M2, ctx.history)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _multiply(dy8, w8, scale * w_scale, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dweight = _multiply(dy8.T, x8, scale * x_scale, ctx.dtypes[1])
        return dx, dweight, None


def _cast(x: torch.Tensor, form: Fp8, history: torch.Tensor | None):
    """Codes of the whole tensor and their scale. With a history of largest magnitudes the scale is
    of its largest, and this one's is noted; before the first it is of x itself."""
    x = x.float()
    finite = torch.where(torch.isfinite(x), x, 0.0)
    largest = finite.abs().amax() if x.numel() else x.new_zeros(())
    if history is not None:
        known = history.amax()
        used = torch.where(known > 0, known, largest)
        history.copy_(torch.cat([history[1:], largest.reshape(1)]))
        largest = used
    scale = (largest / form.max).clamp(min=SCALE_FLOOR)
    return (x / scale).clamp(-form.max, form.max).to(form.code_dtype), scale


def _multiply(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
    return ((a.float() @ b.float()) * scale).to(dtype)


class Fp8Linear(nn.Linear):
    """y = x @ W^T + bias with x and W rounded to e4m3 and the gradient of y to e5m2, one scale a
    tensor, passing straight through the rounding; weights and their gradients keep their dtype.

    Codes are exact and products are summed in fp32, on every device by torch's dense product: this
    trains as fp8 hardware does, keeps a byte a number for the backward, and is not faster. Values
    beyond a delayed scale saturate; NaN stays NaN.

    Args:
        in_features, out_features, bias, device, dtype: of nn.Linear.
        scaling: "current": the scale of the tensor itself; "delayed": of the largest magnitude in
            the last `history` steps of training, kept in the buffer amax_history (3, history) for
            x, the weight and the gradient. In eval mode nothing is noted.
        history: steps.

    Source: FP8 Formats for Deep Learning, arXiv:2209.05433, section 3; delayed scaling as in
    NVIDIA's Transformer Engine.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 scaling: str = "current", history: int = 16, device=None, dtype=None):  # fmt: skip
        check_choice("Fp8Linear", "scaling", scaling, SCALINGS)
        if history < 1:
            fail("Fp8Linear", "history", "at least 1", history)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scaling = scaling
        noted = torch.zeros(len(_ROLES), history, device=device) if scaling == "delayed" else None
        self.register_buffer("amax_history", noted)

    @classmethod
    def from_float(cls, linear: nn.Linear, *, scaling: str = "current",
                   history: int = 16) -> "Fp8Linear":  # fmt: skip
        """A layer with the parameters of `linear` themselves.

        Raises:
            ValueError: not an nn.Linear.
        """
        if type(linear) is not nn.Linear:
            fail("Fp8Linear", "linear", "an nn.Linear", type(linear).__name__)
        n, k = linear.weight.shape
        made = cls(k, n, bias=False, scaling=scaling, history=history, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        if made.amax_history is not None:
            made.amax_history = torch.zeros(made.amax_history.shape, device=linear.weight.device)
        return made.train(linear.training)

    def _apply(self, fn, recurse=True):
        history = self._buffers.pop("amax_history")
        super()._apply(fn, recurse)
        if history is not None:  # stays fp32
            moved = fn(history)
            history = moved if moved.dtype == history.dtype else history.to(moved.device)
        self.register_buffer("amax_history", history)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            fail("Fp8Linear", "x", f"(..., {self.in_features})", f"shape {tuple(x.shape)}")
        histories = [None] * len(_ROLES)
        if self.amax_history is not None:
            rows = self.amax_history if self.training else self.amax_history.clone()
            histories = list(rows)
        y = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, histories)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scaling={self.scaling}"


def train_in_fp8(model: nn.Module, *, scaling: str = "delayed", history: int = 16,
                 skip: Collection[str] = ("lm_head",)) -> nn.Module:  # fmt: skip
    """Replaces every nn.Linear of the model by an Fp8Linear with the same parameters, in place.

    Args:
        skip: layers to leave, each as a run of dotted name parts.

    Raises:
        ValueError: no layer is left to replace.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear
             and not any(f".{entry}." in f".{name}." for entry in skip)}  # fmt: skip
    if not found or "" in found:
        fail("train_in_fp8", "model", "one that holds nn.Linear layers", type(model).__name__)
    for name, linear in found.items():
        model.set_submodule(name, Fp8Linear.from_float(linear, scaling=scaling, history=history))
    return model
