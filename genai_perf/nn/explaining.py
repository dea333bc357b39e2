"""explain: which kernel a call runs, or each layer of a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .._dispatch import Explanation
from .._dispatch import explain as explain_call
from .experts import QuantizedStack
from .linear import QuantLinear, dense_weight
from .sparse import SparseLinear


@dataclass(frozen=True)
class LayerExplanation:
    """One layer: how its weight is held, what multiplies by it, and why not better.

    name: as in `model.named_modules()`; format: a quantization format, a sparse layout or a dtype;
    kernel: a backend of `quant_matmul` or `sparse_matmul`, or "torch"; reason: why it is dense, or
    why the backends before `kernel` do not run; empty where the first choice does.
    """

    name: str
    format: str
    kernel: str
    reason: str
    parameters: int
    nbytes: int

    @property
    def slow(self) -> bool:
        """Whether the layer is compressed and has no kernel for it."""
        return self.kernel == "reference"


@dataclass(frozen=True)
class ModelExplanation:
    """Every layer of a model that multiplies by a weight; prints as a table."""

    layers: tuple[LayerExplanation, ...]

    def __str__(self) -> str:
        rows = [("layer", "format", "kernel", "MB", "reason")]
        rows += [(layer.name or "(the model)", layer.format, layer.kernel,
                  f"{layer.nbytes / 1e6:.2f}", layer.reason) for layer in self.layers]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)) + "  "
                 + row[4] for row in rows]  # fmt: skip
        total = sum(layer.parameters for layer in self.layers)
        dense = sum(layer.parameters for layer in self.layers if layer.kernel == "torch")
        share = f"{dense / total:.1%}" if total else "none"
        lines.append(f"{share} of {total:,} weights in these layers are dense")
        return "\n".join(line.rstrip() for line in lines)


def explain(op: Callable, *args, **kwargs) -> Explanation | ModelExplanation:
    """What runs `op(*args, **kwargs)`, and why the other backends do not; or what runs each layer.

    Args:
        op: a public function of genai_perf, such as `genai_perf.attention`, with its arguments; or
            a model (nn.Module) and nothing else.

    Returns:
        Explanation: of a call, with `.backend` and `.reasons`; ModelExplanation: of a model, with
        `.layers`. Both print. Nothing is computed beyond the argument checks.

    Raises:
        ValueError: the call runs no op of genai_perf, or the model holds no layer with a weight.
    """
    if isinstance(op, nn.Module) and not args and not kwargs:
        return explain_model(op)
    return explain_call(op, *args, **kwargs)


def explain_model(model: nn.Module) -> ModelExplanation:
    """Each linear layer and stack of expert weights; see `explain`."""
    record = getattr(model, "quantization_record", None)
    skipped = {} if record is None else record.skipped
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | SparseLinear | QuantizedStack):
            layers.append(explain_layer(name, module))
        elif dense_weight(module) is not None:
            layers.append(_dense(name, module.weight, skipped.get(name, "not quantized")))
        elif not type(module).__module__.startswith("torch.nn."):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    full = f"{name}.{leaf}".lstrip(".")
                    layers.append(_dense(full, parameter, skipped.get(full, "not quantized")))
    if not layers:
        raise ValueError(f"explain: {type(model).__name__} holds no linear layer")
    return ModelExplanation(tuple(layers))


def explain_layer(name: str, layer: QuantLinear | SparseLinear | QuantizedStack):
    """LayerExplanation of one compressed layer, asked with one row in the dtype that its weight
    came from; of a stack of experts, its first."""
    stack = layer if isinstance(layer, QuantizedStack) else None
    if stack is not None:
        weight = stack.weights[0].tensor()
    else:
        weight = layer.weight.tensor() if isinstance(layer, QuantLinear) else layer.tensor()
    x = torch.zeros(1, weight.shape[-1], dtype=_dtype(layer, weight), device=_any(weight).device)
    with torch.no_grad():
        told = explain_call(layer, x) if stack is None else explain_call(stack.product, x, 0)
    before = list(told.reasons)[: list(told.reasons).index(told.backend)]
    reason = "" if told.backend != "reference" else "; ".join(told.reasons[b] for b in before)
    form = f"sparse {weight.layout}" if isinstance(layer, SparseLinear) else weight.format
    count, nbytes = weight.shape.numel(), weight.nbytes
    if stack is not None:
        count, nbytes = stack.shape.numel(), stack.nbytes
    return LayerExplanation(name, form, told.backend, reason, count, nbytes)


def _any(weight) -> torch.Tensor:
    return next(iter(weight.components().values()))


def _dtype(layer: nn.Module, weight) -> torch.dtype:
    bias = getattr(layer, "bias", None)
    return weight.dtype if bias is None else bias.dtype


def _dense(name: str, weight: torch.Tensor, reason: str) -> LayerExplanation:
    form = str(weight.dtype).removeprefix("torch.")
    return LayerExplanation(name, form, "torch", reason, weight.numel(), weight.nbytes)
