"""Structured pruning: what blocks, neurons, head groups and experts contribute, and what is left
of a state dict without the least of them.

Module names are those of Llama and its many relatives in transformers (Mistral, Qwen, Gemma,
Mixtral, ...): q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; experts as stacked
`gate_up_proj` and `down_proj` beside a router `gate`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .._errors import CheckpointError
from .hessian import Hessian


@dataclass
class Scores:
    """What each part contributes, one entry a block.

    Attributes:
        blocks: 1 - cosine of a block's input and output, mean over tokens.
        neurons: (intermediate,), energy that each feed-forward neuron adds to the output.
        groups: (key-value heads,), the same for each group of query heads with its key-value head.
        experts: (experts,), routing weight times output norm, summed over tokens.
    """

    blocks: list[float] = field(default_factory=list)
    neurons: list[torch.Tensor] = field(default_factory=list)
    groups: list[torch.Tensor] = field(default_factory=list)
    experts: list[torch.Tensor] = field(default_factory=list)


class Influence:
    """Sums up 1 - cos(input, output) of a block over tokens.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", section 2.
    """

    def __init__(self):
        self.total, self.tokens = 0.0, 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.total += float((1 - cosine).sum(dtype=torch.float64))
        self.tokens += cosine.numel()

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)


def neuron_energy(down: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E[a_j^2] * ||w_j||^2 of each neuron, from down_proj and the Hessian of its input."""
    return hessian.diagonal() * down.float().square().sum(0)


def group_energy(out: torch.Tensor, hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """E ||W_g a_g||^2 of each of `groups` equal column blocks: out (hidden, heads * head_dim)."""
    width = out.shape[1] // groups
    energy = []
    for start in range(0, out.shape[1], width):
        part = out[:, start : start + width].float()
        energy.append(((part @ hessian[start : start + width, start : start + width]) * part).sum())
    return torch.stack(energy)


def best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` largest, rising; equal ones to the lower index."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def expert_scores(experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor,
                  weights: torch.Tensor, count: int) -> torch.Tensor:  # fmt: skip
    """Sum over tokens of routing weight times the norm of the expert's output, (count,).

    Source: Lasby et al. 2025, "REAP the Experts", whose criterion this is.
    """
    scores = torch.zeros(count)
    for expert in range(count):
        token, place = (index == expert).nonzero(as_tuple=True)
        if len(token):
            alone = torch.full((len(token), 1), expert, dtype=index.dtype, device=index.device)
            output = experts(hidden[token], alone, torch.ones_like(alone, dtype=weights.dtype))
            scores[expert] = (weights[token, place] * output.norm(dim=-1)).float().sum().cpu()
    return scores


def keep_blocks(
    state: Mapping[str, torch.Tensor], prefix: str, kept: list[int]
) -> dict[str, torch.Tensor]:
    """The state without the other blocks; `prefix`.0 ... are renumbered."""
    new = {}
    for name, tensor in state.items():
        if not name.startswith(prefix + "."):
            new[name] = tensor
            continue
        number, _, rest = name.removeprefix(prefix + ".").partition(".")
        if int(number) in kept:
            new[f"{prefix}.{kept.index(int(number))}.{rest}"] = tensor
    return new


def _rows(state: dict, name: str, index: torch.Tensor) -> None:
    for part in ("weight", "bias"):
        if f"{name}.{part}" in state:
            state[f"{name}.{part}"] = state[f"{name}.{part}"][index].clone()


def _columns(state: dict, name: str, index: torch.Tensor) -> None:
    state[f"{name}.weight"] = state[f"{name}.weight"][:, index].clone()


def _need(state: Mapping, block: str, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if f"{block}.{name}.weight" not in state:
            raise CheckpointError(f"{block}: has no {name}, which pruning {what} needs")


def keep_neurons(state: dict[str, torch.Tensor], block: str, kept: torch.Tensor) -> None:
    """Slices the feed-forward matrices of one block to the neurons `kept`."""
    _need(state, block, ("mlp.up_proj", "mlp.down_proj"), "feed-forward neurons")
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        if f"{block}.{name}.weight" in state:
            _rows(state, f"{block}.{name}", kept)
    _columns(state, f"{block}.mlp.down_proj", kept)


def keep_groups(
    state: dict[str, torch.Tensor], block: str, kept: torch.Tensor, groups: int
) -> None:
    """Slices attention of one block to the key-value heads `kept`, with their query heads."""
    names = tuple(f"self_attn.{n}_proj" for n in "qkvo")
    _need(state, block, names, "head groups")
    query, key, value, out = (f"{block}.{name}" for name in names)

    def spread(length: int) -> torch.Tensor:
        width = length // groups
        return (kept[:, None] * width + torch.arange(width)).flatten()

    heads = spread(state[f"{query}.weight"].shape[0])
    _rows(state, query, heads)
    _columns(state, out, heads)
    for name in (key, value):
        _rows(state, name, spread(state[f"{name}.weight"].shape[0]))


def keep_experts(
    state: dict[str, torch.Tensor], router: str, experts: str, kept: torch.Tensor
) -> None:
    """Slices the stacked expert matrices and the router of one block to the experts `kept`."""
    count = state[f"{router}.weight"].shape[0]
    for name in [name for name in state if name.startswith((f"{experts}.", f"{router}."))]:
        if state[name].dim() and state[name].shape[0] == count:
            state[name] = state[name][kept].clone()


class Watch:
    """Forward hooks on a model that collect `Scores` while it runs.

    Args:
        model: the whole model.
        blocks: (name, module) of its decoder blocks.
        neurons, groups, experts: what to score beside the blocks.
    """

    def __init__(self, blocks, *, neurons: bool, groups: int, experts: bool):
        self._blocks, self._groups = blocks, groups
        self._influence = [Influence() for _ in blocks]
        self._hessians: dict[tuple[int, str], Hessian] = {}
        self._experts: dict[int, torch.Tensor] = {}
        self._handles = []
        for i, (name, block) in enumerate(blocks):
            self._handles.append(block.register_forward_hook(self._block(i), with_kwargs=True))
            wanted = (["mlp.down_proj"] if neurons else []) + (
                ["self_attn.o_proj"] if groups else []
            )
            for part in wanted:
                try:
                    linear = block.get_submodule(part)
                except AttributeError:
                    raise CheckpointError(
                        f"{name}: has no {part}: its structure is not known"
                    ) from None
                self._hessians[i, part] = Hessian(linear.weight.shape[1], name=f"{name}.{part}")
                self._handles.append(linear.register_forward_pre_hook(self._input(i, part)))
            if experts:
                module = find_experts(name, block)[1]
                self._handles.append(module.register_forward_pre_hook(self._routed(i)))

    def _block(self, i):
        def after(module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            self._influence[i].add(hidden, output)

        return after

    def _input(self, i, part):
        return lambda module, args: self._hessians[i, part].add(args[0])

    def _routed(self, i):
        def before(module, args):
            if getattr(module, "_scored", False):
                return
            module._scored = True
            hidden, index, weights = args
            count = module.down_proj.shape[0]
            found = expert_scores(module, hidden, index, weights, count)
            self._experts[i] = self._experts.get(i, 0) + found
            module._scored = False

        return before

    def scores(self) -> Scores:
        """What was collected; removes the hooks."""
        for handle in self._handles:
            handle.remove()
        scores = Scores(blocks=[one.mean for one in self._influence])
        for i, (_, block) in enumerate(self._blocks):
            if (i, "mlp.down_proj") in self._hessians:
                hessian = self._hessians[i, "mlp.down_proj"].matrix()
                scores.neurons.append(neuron_energy(block.mlp.down_proj.weight.detach(), hessian))
            if (i, "self_attn.o_proj") in self._hessians:
                hessian = self._hessians[i, "self_attn.o_proj"].matrix()
                weight = block.self_attn.o_proj.weight.detach()
                scores.groups.append(group_energy(weight, hessian, self._groups))
            if i in self._experts:
                scores.experts.append(self._experts[i])
        return scores


def find_experts(name: str, block: nn.Module) -> tuple[str, nn.Module, str]:
    """(name of the experts in the block, the module, name of their router)."""
    for part, module in block.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            parent = part.rpartition(".")[0]
            router = f"{parent}.gate" if parent else "gate"
            if f"{router}.weight" in dict(block.named_parameters()):
                return part, module, router
    raise CheckpointError(f"{name}: has no stacked experts with a router named gate")
