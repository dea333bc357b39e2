"""Experts of a mixture, stacked in one parameter (count, ., .): where they are, and quantized."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .._checks import fail
from ..formats import QuantizedTensor
from ..ops.quant_matmul import quant_matmul
from ..ops.quantize import dequantize
from .linear import QuantConfig, QuantizedWeight


@dataclass(frozen=True, eq=False)
class Stack:
    """One 3-D parameter of experts.

    Attributes:
        owner: the module that owns it.
        parameter: its name there.
        transposed: it holds (in_features, out_features) matrices, not (out, in).
        interleaved: outputs of gate_proj and up_proj take turns in it, not one after the other.
    """

    owner: nn.Module
    parameter: str
    transposed: bool
    interleaved: bool

    @property
    def weight(self) -> torch.Tensor:
        return getattr(self.owner, self.parameter)

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers that one matrix of it stands for, by their usual names: its outputs
        are theirs."""
        return ("gate_proj", "up_proj") if self.parameter == "gate_up_proj" else (self.parameter,)


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of a model, by the full names of their parameters.

    A stack is a 3-D parameter of a module whose name ends in "experts". How its matrices lie is
    what the module says (transformers' `is_transposed`, `is_concatenated`) or what the sizes of
    gate_up_proj and down_proj say: the first gives twice what the second takes.
    """
    found = {}
    for path, owner in model.named_modules():
        stacks = {name: parameter for name, parameter in owner.named_parameters(recurse=False)
                  if parameter.dim() == 3 and parameter.is_floating_point()}  # fmt: skip
        transposed = _transposed(owner) if path.endswith("experts") and stacks else None
        if transposed is not None:
            turns = getattr(owner, "is_concatenated", True) is False
            found |= {f"{path}.{name}": Stack(owner, name, transposed,
                                              turns and name == "gate_up_proj")
                      for name in stacks}  # fmt: skip
    return found


def _transposed(owner: nn.Module) -> bool | None:
    said = getattr(owner, "is_transposed", None)
    if isinstance(said, bool):
        return said
    first, second = (getattr(owner, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(first, nn.Parameter) or not isinstance(second, nn.Parameter):
        return None
    if first.shape[2] == second.shape[1] and first.shape[1] == 2 * second.shape[2]:
        return False
    if first.shape[1] == second.shape[2] and first.shape[2] == 2 * second.shape[1]:
        return True
    return None


class QuantizedStack(nn.Module):
    """Experts, each quantized by itself, in the place of the 3-D parameter that held them.

    `stack[i]` goes to `F.linear` (or to `@`, where the parameter held the matrices transposed) and
    the whole to `torch.bmm`, as the parameter did, so that the forward around it stays what it is;
    the products are `quant_matmul`. x gets gradients, the weights none. torch.compile breaks its
    graph at transformers' loop over the experts that tokens chose, which depends on data;
    `fullgraph=True` is for models that multiply whole stacks (Llama 4).

    Args:
        weights: one (out_features, in_features) weight an expert, all of one shape.
        transposed: of the parameter, see `Stack`.
        activations, threshold, backend: of `quant_matmul`.
    """

    def __init__(self, weights: Sequence[QuantizedTensor], *, transposed: bool,
                 activations: str | None = None, threshold: float = 0.0,
                 backend: str | None = None):  # fmt: skip
        super().__init__()
        if not weights or any(w.shape != weights[0].shape or len(w.shape) != 2 for w in weights):
            fail("QuantizedStack", "weights", "one or more of one shape (N, K)",
                 str([tuple(w.shape) for w in weights]))  # fmt: skip
        self.weights = nn.ModuleList(map(QuantizedWeight, weights))
        self.transposed, self.backend = transposed, backend
        self.activations, self.threshold = activations, threshold

    @classmethod
    def from_float(cls, stack: torch.Tensor, config: str | QuantConfig, *, transposed: bool,
                   importance: torch.Tensor | None = None) -> "QuantizedStack":  # fmt: skip
        """A quantized copy of `stack`, (experts, out, in), or (experts, in, out) if `transposed`;
        importance (in), of `genai_perf.quantize`, is that of every expert.

        Raises:
            ValueError: a weight with an infinity or NaN; see `QuantConfig`.
        """
        config = QuantConfig.of(config)
        rows = [(m.T if transposed else m).contiguous() for m in stack.detach()]
        return cls([config.quantize(matrix, importance) for matrix in rows], transposed=transposed,
                   activations=config.activations, threshold=config.threshold)  # fmt: skip

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        n, k = self.weights[0].shape
        return torch.Size((len(self.weights), *((k, n) if self.transposed else (n, k))))

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def format(self) -> str:
        return self.weights[0].format

    @property
    def nbytes(self) -> int:
        return sum(weight.tensor().nbytes for weight in self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int | torch.Tensor) -> "_Matrix":
        """The matrix of one expert, for the one product that it is taken for."""
        return _Matrix(self, int(index))

    def product(self, x: torch.Tensor, index: int, bias: torch.Tensor | None = None):
        """x (..., in_features) times expert `index`, plus bias: (..., out_features)."""
        return quant_matmul(x, self.weights[index].tensor(), bias, activations=self.activations,
                            threshold=self.threshold, backend=self.backend)  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The stack that this stands for, as the parameter had it."""
        dense = torch.stack([dequantize(weight.tensor(), dtype) for weight in self.weights])
        return dense.transpose(1, 2).contiguous() if self.transposed else dense

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.bmm, torch.Tensor.bmm) and len(args) == 2 and not kwargs:
            x, stack = args
            if isinstance(stack, cls) and stack.transposed:
                return torch.stack([stack.product(part, i) for i, part in enumerate(x)])
        _refuse(func, "bmm of a stack of transposed matrices")

    def extra_repr(self) -> str:
        return f"{self.format}, shape={tuple(self.shape)}, {self.nbytes} bytes"


class _Matrix:
    """One expert's matrix on its way from its stack to its product."""

    def __init__(self, stack: QuantizedStack, index: int):
        self.stack, self.index = stack, index

    def float(self) -> "_Matrix":
        """Itself: products are fp32 whatever the dtype of x."""
        return self

    def __rmatmul__(self, x):  # what torch turns a TypeError of its own `@` into
        _refuse(torch.matmul, _KNOWN)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        x, matrix, bias = (*args, None, None)[:3] if len(args) in (2, 3) else (None,) * 3
        if isinstance(matrix, cls) and len(args) + len(kwargs or {}) <= 3:
            stack = matrix.stack
            if func is nn.functional.linear and not stack.transposed:
                return stack.product(x, matrix.index, (kwargs or {}).get("bias", bias))
            if func in PRODUCTS and stack.transposed and not kwargs and bias is None:
                return stack.product(x, matrix.index)
        _refuse(func, _KNOWN)


_KNOWN = "linear, or matmul where it is stored transposed"


def _refuse(func, known: str):
    name = getattr(func, "__name__", str(func))
    raise TypeError(f"a quantized expert takes part in one product, {known}: got {name}; leave its "
                    f"stack dense with skip=")  # fmt: skip


PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


def put(stack: Stack, quantized: QuantizedStack) -> None:
    """Puts `quantized` in the place of the parameter, and has its module take one expert at a
    time."""
    delattr(stack.owner, stack.parameter)
    setattr(stack.owner, stack.parameter, quantized.train(stack.owner.training))
    config = getattr(stack.owner, "config", None)
    if getattr(config, "_experts_implementation", "eager") != "eager":
        # transformers' other ways multiply whole stacks; the module alone changes its way.
        stack.owner.config = copy.deepcopy(config)
        stack.owner.config._experts_implementation = "eager"
