"""A student made from its teacher: fewer layers, narrower MLPs."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from .._checks import fail
from . import skeleton

_MLP = ("gate_proj", "up_proj", "down_proj")


def student_from_teacher(teacher: nn.Module, *, layers: int | Sequence[int] | None = None,
                         intermediate_size: int | None = None) -> nn.Module:  # fmt: skip
    """A copy of a transformers model with fewer layers or narrower MLPs, its config to match.

    Args:
        teacher: left as it is.
        layers: how many to keep, evenly spread with the first and the last among them (DistilBERT
            takes every second one), or which ones; None: all.
        intermediate_size: channels of each gated MLP to keep: those of the largest product of the
            norms of their gate, up and down weights. None: all.

    Returns:
        nn.Module: a model that `save_pretrained` writes and `from_pretrained` reads.

    Raises:
        ValueError: layers or channels that the teacher does not have, or another kind of MLP.

    Source: Sanh et al., arXiv:1910.01108 (DistilBERT), section 3.
    """
    name = skeleton.find_blocks(teacher)[0][0].rpartition(".")[0]
    count = len(teacher.get_submodule(name))
    student = copy.deepcopy(teacher).requires_grad_(True)  # the teacher may be frozen
    if layers is not None:
        kept = _spread(layers, count) if isinstance(layers, int) else list(layers)
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= count:
            fail("student_from_teacher", "layers", f"from 0 to {count - 1}, rising", kept)
        _keep_layers(student, name, kept)
    if intermediate_size is not None:
        _narrow(student, student.get_submodule(name), intermediate_size)
    return student


def _spread(layers: int, count: int) -> list[int]:
    if not 1 <= layers <= count:
        fail("student_from_teacher", "layers", f"from 1 to {count}", layers)
    if layers == 1:
        return [0]
    return [round(i * (count - 1) / (layers - 1)) for i in range(layers)]


def _keep_layers(student: nn.Module, name: str, kept: list[int]) -> None:
    parent, _, leaf = name.rpartition(".")
    blocks = student.get_submodule(name)
    setattr(student.get_submodule(parent), leaf, nn.ModuleList(blocks[i] for i in kept))
    for index, block in enumerate(student.get_submodule(name)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config = student.config.get_text_config()
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [config.layer_types[i] for i in kept]
    config.num_hidden_layers = len(kept)


@torch.no_grad()
def _narrow(student: nn.Module, blocks: nn.ModuleList, size: int) -> None:
    mlps = [m for m in blocks.modules() if all(hasattr(m, part) for part in _MLP)]
    if len(mlps) != len(blocks):
        raise ValueError("student_from_teacher: intermediate_size needs one gated MLP "
                         f"({', '.join(_MLP)}) a layer, found {len(mlps)} in {len(blocks)} layers"
                         )  # fmt: skip
    for mlp in mlps:
        gate, up, down = (getattr(mlp, part) for part in _MLP)
        if not 1 <= size <= gate.out_features:
            fail("student_from_teacher", "intermediate_size", f"from 1 to {gate.out_features}",
                 size)  # fmt: skip
        score = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
        keep = score.topk(size).indices.sort().values
        for layer in (gate, up):
            layer.weight = nn.Parameter(layer.weight[keep].clone())
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias[keep].clone())
            layer.out_features = size
        down.weight = nn.Parameter(down.weight[:, keep].clone())
        down.in_features = size
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = size
    student.config.get_text_config().intermediate_size = size
