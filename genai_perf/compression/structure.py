"""Which layers of a block read which normalization: found by running it, not by names."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .._errors import CheckpointError
from .capture import Layer, watched
from .experts import Expert


@dataclass(frozen=True)
class Probe:
    """A short input of the blocks: hidden (1, tokens, hidden size), and each block's arguments."""

    hidden: torch.Tensor
    kwargs: list[dict]


@dataclass(frozen=True)
class Norm:
    """A normalization and the layers that are given its output as it is.

    Attributes:
        name: full name of the module.
        module: RMSNorm of any family, or nn.LayerNorm.
        readers: full name -> linear layer; where it feeds a mixture, also the experts' matrices
            that take hidden states.
        routers: full name -> module whose weight, (outputs, hidden size), reads it too and is no
            linear layer.
    """

    name: str
    module: nn.Module
    readers: dict[str, Layer]
    routers: dict[str, nn.Module]

    @property
    def gain(self) -> torch.Tensor:
        """What the module multiplies by, (hidden size,): some families store it less 1."""
        return self.module.weight.detach() + gain_offset(self.module)

    def set_gain(self, gain: torch.Tensor) -> None:
        value = gain.to(self.module.weight.dtype) - gain_offset(self.module)
        self.module.weight = nn.Parameter(value, requires_grad=False)


def is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    rms = type(module).__name__.endswith("RMSNorm") and getattr(module, "bias", None) is None
    return rms and isinstance(weight, nn.Parameter) and weight.dim() == 1


def gain_offset(norm: nn.Module) -> float:
    """What the family of a normalization adds to its stored gain: 1 or 0. The module itself may
    have no weights: a small one of its class says it."""
    if isinstance(norm, nn.LayerNorm):
        return 0.0
    twin = type(norm)(8)
    return float((twin(torch.ones(8)) - twin.weight).detach().float().mean().round())


def norms(model, i: int, probe: Probe) -> list[Norm]:
    """The normalizations of block i, loaded, that linear layers read directly, in order."""
    prefix, block = model.blocks[i]
    linears: dict[str, Layer] = model.linears(i)
    outputs: dict[int, str] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice
    found: dict[str, Norm] = {}

    def record(name: str, module: nn.Module) -> Callable:
        def after(_module, _args, output):
            held.append(output)
            outputs[output.data_ptr()] = name
            found[name] = Norm(name, module, {}, {})

        return after

    def seen(name: str, x: torch.Tensor) -> None:
        norm = outputs.get(x.data_ptr())
        if norm is not None and x.numel() == probe.hidden.numel():
            found[norm].readers[name] = linears[name]

    def enters(mixture: str) -> Callable:
        def before(_module, args):
            norm = found.get(outputs.get(args[0].data_ptr(), ""))
            if norm is not None:
                _add_mixture(norm, block, prefix, mixture, linears)

        return before

    around = {name[len(prefix) + 1 :].rpartition(".experts.")[0] for name, layer in linears.items()
              if isinstance(layer, Expert)}  # fmt: skip
    handles = [module.register_forward_hook(record(f"{prefix}.{name}", module))
               for name, module in block.named_modules()
               if is_rms_norm(module) or type(module) is nn.LayerNorm]  # fmt: skip
    handles += [block.get_submodule(m).register_forward_pre_hook(enters(m)) for m in around]
    try:
        with watched(linears, seen):
            run(model, i, probe)
    finally:
        for handle in handles:
            handle.remove()
    return [norm for norm in found.values() if norm.readers]


def _add_mixture(
    norm: Norm, block: nn.Module, prefix: str, mixture: str, linears: dict[str, Layer]
) -> None:
    """The experts of a mixture that a normalization feeds, and what chooses among them."""
    inside, size = f"{prefix}.{mixture}.", norm.module.weight.shape[0]
    for name, layer in linears.items():
        first = isinstance(layer, Expert) and layer.stack.parameter != "down_proj"
        if name.startswith(inside) and first and layer.weight.shape[1] == size:
            norm.readers[name] = layer
    for name, module in block.get_submodule(mixture).named_modules():
        weight = module._parameters.get("weight")
        known = f"{inside}{name}" in linears or weight is None or weight.dim() != 2
        if not known and weight.shape[1] == size:
            norm.routers[f"{inside}{name}"] = module


def run(model, i: int, probe: Probe, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Block i's output for the probe, or for other hidden states of its shape."""
    return model.forward_block(i, probe.hidden if hidden is None else hidden, probe.kwargs[i])


def check_same(block: str, what: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Refuses a change that was to leave a block's output alone and did not.

    Raises:
        CheckpointError: names the block.
    """
    tolerance = 1e-3 if before.dtype == torch.float32 else 0.1
    apart = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
    if not apart <= tolerance:
        raise CheckpointError(f"{block}: {what} changes its output (by {apart:.2g} of its largest "
                              f"entry): its structure is not one that {what} knows")  # fmt: skip
