"""A transformers model without weights for a checkpoint, and the names that lead from one to the other."""

from collections.abc import Iterator

import torch
from torch import nn

from .._errors import CheckpointError
from ..io.checkpoints import CONFIG, Checkpoint


def build(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model of a checkpoint: parameters on the meta device, buffers real.

    Only classes that the installed transformers has are used; code that the folder carries
    (`auto_map`) is never run.

    Args:
        checkpoint: the opened folder.
        dtype: of the parameters; None: what the checkpoint says.

    Raises:
        CheckpointError: an unknown architecture, or a config that transformers refuses.
    """
    import transformers
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = checkpoint.path / CONFIG
    architecture = (checkpoint.config.get("architectures") or [None])[0]
    model_type = checkpoint.config.get("model_type")
    known = isinstance(architecture, str) and architecture in dir(transformers)
    if not known or model_type not in CONFIG_MAPPING:
        what = f"architecture {architecture!r}" if not known else f"model type {model_type!r}"
        raise CheckpointError(f"{file}: {what} is not in transformers {transformers.__version__}, "
                              f"and code that a checkpoint carries is never run")  # fmt: skip
    try:
        config = CONFIG_MAPPING[model_type].from_dict(checkpoint.config)
        config.dtype = dtype or config.dtype or stored_dtype(checkpoint)
        with init_empty_weights(include_buffers=False):
            model = getattr(transformers, architecture)._from_config(config, dtype=config.dtype)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: transformers refuses this config: {reason}") from error
    model.tie_weights()  # init_empty_weights made a new parameter of each tied one
    return model.eval()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating-point tensor, as transformers finds it."""
    dtypes = (checkpoint.info(name).dtype for name in checkpoint.names())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


class Names:
    """From the model's tensor names to the checkpoint's.

    They differ where a checkpoint was saved from the model without its head (`h.0.attn` for
    `transformer.h.0.attn`) or the other way round, and for tied tensors, which are stored once.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module):
        self.checkpoint = checkpoint
        self.prefix = f"{model.base_model_prefix}."
        # name -> every other name of the same tied parameter
        by_id: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            by_id.setdefault(id(parameter), []).append(name)
        self.tied = {name: names for names in by_id.values() if len(names) > 1 for name in names}

    def find(self, name: str) -> str | None:
        """The checkpoint's name of a tensor of the model, or None."""
        for candidate in (name, *self.tied.get(name, ())):
            for spelling in (candidate, candidate.removeprefix(self.prefix), self.prefix + candidate):
                if spelling in self.checkpoint:
                    return spelling
        return None

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The stored tensor of `name`, mapped, its shape checked against the model's.

        Raises:
            CheckpointError: the checkpoint lacks it or its shape differs.
        """
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name!r} of the model is missing")
        info = self.checkpoint.info(found)
        if info.shape != tuple(shape):
            raise CheckpointError(f"{info.file}: tensor {found!r} must have shape {list(shape)} "
                                  f"by {CONFIG}, got {list(info.shape)}")  # fmt: skip
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{info.file}: tensor {found!r} must be floating point, "
                                  f"got {info.dtype}")  # fmt: skip
        return self.checkpoint.tensor(found)


def stored(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of `module` under their full names, each object once."""
    persistent = module.state_dict(prefix=prefix, keep_vars=True)
    seen: set[int] = set()
    for name, tensor in persistent.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts `tensor` in the place of the parameter or buffer `name`, without a copy."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks, as (name, module): the members of the ModuleList that holds the most
    parameters, with linears in it. An outer list holds at least what a list inside it does, so
    experts never win over the blocks that hold them."""
    best, most = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(is_linear(m) for m in module.modules()):
            count = sum(parameter.numel() for parameter in module.parameters())
            if count > most:
                best, most = name, count
    if not most:
        raise CheckpointError(f"{type(model).__name__}: no list of blocks with linear layers found")
    return [(f"{best}.{i}", block) for i, block in enumerate(model.get_submodule(best))]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear itself, or GPT-2's Conv1D, which is a linear with the transposed weight."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
