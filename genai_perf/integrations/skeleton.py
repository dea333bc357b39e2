"""A transformers model without weights for a checkpoint, and which tensors of it go where."""

import copy
import math
import re
from collections.abc import Iterator

import torch
from torch import nn

from .._errors import CheckpointError
from ..io.checkpoints import CONFIG, Checkpoint


def build(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model of a checkpoint: parameters on the meta device, buffers real, stacked
    experts run one by one, which calibration can follow.

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
    if not known or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        what = f"architecture {architecture!r}" if not known else f"model type {model_type!r}"
        raise CheckpointError(f"{file}: {what} is not in transformers {transformers.__version__}, "
                              f"and code that a checkpoint carries is never run")  # fmt: skip
    try:
        config = CONFIG_MAPPING[model_type].from_dict(checkpoint.config)
        config.dtype = dtype or config.dtype or stored_dtype(checkpoint)
        with init_empty_weights(include_buffers=False):
            model = getattr(transformers, architecture)._from_config(
                config, dtype=config.dtype, experts_implementation="eager"
            )
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: transformers refuses this config: {reason}") from error
    model.tie_weights()  # init_empty_weights made a new parameter of each tied one
    return model.eval()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating-point tensor, as transformers finds it."""
    dtypes = (checkpoint.info(name).dtype for name in checkpoint.names())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


class Renaming:
    """From a checkpoint's tensor name to the model's, by transformers' own table: gives the name,
    and the source pattern of the converter that matched or None.

    converters: source pattern -> the converter that makes one tensor of several.
    """

    def __init__(self, model: nn.Module):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self._rename, self._prefix = rename_source_key, model.base_model_prefix
        self._known = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        self.converters = {p: c for c in self._converters for p in c.source_patterns}

    def __call__(self, source: str) -> tuple[str, str | None]:
        name, pattern = self._rename(source, self._renamings, self._converters, self._prefix,
                                     self._known)  # fmt: skip
        if source in self._known and name not in self._known:
            return source, None
        return name, pattern


class Names:
    """From the model's tensor names to the checkpoint's tensors.

    They differ where a checkpoint was saved without the head or with older names, where one tensor
    of the model is stored in parts (experts one by one, which transformers stacks), and for tied
    tensors, which are stored once. transformers' own table of conversions is applied.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module):
        self.checkpoint, self.model = checkpoint, model
        by_id: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            by_id.setdefault(id(parameter), []).append(name)
        self._tied = {name: names for names in by_id.values() for name in names}
        renaming = Renaming(model)
        # name in the model -> (names in the checkpoint with the pattern that matched, converter)
        self._sources: dict[str, tuple[list[tuple[str, str | None]], object]] = {}
        for source in sorted(checkpoint.names(), key=_natural):
            name, pattern = renaming(source)
            sources, _ = self._sources.setdefault(name, ([], renaming.converters.get(pattern)))
            sources.append((source, pattern))

    def find(self, name: str) -> list[str]:
        """The checkpoint's tensors that make up a tensor of the model; none where it lacks it."""
        for spelling in (name, *self._tied.get(name, ())):
            if spelling in self._sources:
                return [source for source, _ in self._sources[spelling][0]]
        return []

    def expert(self, stack: str, index: int) -> list[str]:
        """The modules of the checkpoint whose rows, one after the other, are the matrix `index` of
        a stack of the model; none where the checkpoint does not hold its experts one by one."""
        sources, converter = self._sources.get(stack, ((), None))
        steps = [(type(step).__name__, step.dim) for step in getattr(converter, "operations", ())
                 if type(step).__name__ in ("MergeModulelist", "Concatenate")]  # fmt: skip
        if not steps or len(steps) != len(converter.operations):
            return []
        if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            return []
        found = [[source for source, matched in sources if matched == pattern][index]
                 for pattern in converter.source_patterns]  # fmt: skip
        if not all(name.endswith(".weight") for name in found):
            return []
        return [name.removesuffix(".weight") for name in found]

    def check(self, name: str, shape: torch.Size) -> None:
        """Raises CheckpointError where the checkpoint lacks `name` or has it in another shape,
        without reading it."""
        found, where = self.find(name), self.checkpoint.path
        if not found:
            raise CheckpointError(f"{where}: tensor {name!r} of the model is missing")
        infos = [self.checkpoint.info(source) for source in found]
        for source, info in zip(found, infos, strict=True):
            if not info.dtype.is_floating_point:
                raise CheckpointError(f"{info.file}: tensor {source!r} must be floating point, "
                                      f"got {info.dtype}")  # fmt: skip
        if len(found) == 1 and infos[0].shape != tuple(shape):
            raise CheckpointError(f"{infos[0].file}: tensor {found[0]!r} must have shape "
                                  f"{list(shape)}, got {list(infos[0].shape)}")  # fmt: skip
        stored, wanted = sum(math.prod(info.shape) for info in infos), math.prod(shape)
        if stored != wanted:
            raise CheckpointError(f"{infos[0].file}: tensors {found[0]!r} ... {found[-1]!r} must "
                                  f"have {wanted} elements, got {stored}")  # fmt: skip

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The stored tensor of `name`: mapped, or stacked where the checkpoint has it in parts.

        Raises:
            CheckpointError: the checkpoint lacks it, or its shape differs.
        """
        self.check(name, shape)
        spelling = next(s for s in (name, *self._tied.get(name, ())) if s in self._sources)
        sources, converter = self._sources[spelling]
        if converter is None:
            return self.checkpoint.tensor(sources[0][0])
        converter = copy.deepcopy(converter)
        for source, pattern in sources:
            converter.add_tensor(spelling, source, pattern, self.checkpoint.tensor(source))
        value = converter.convert(spelling, model=self.model, config=self.model.config)[spelling]
        return value[0] if isinstance(value, list) else value


def _natural(name: str) -> list:
    """Sort key with numbers as numbers: expert 10 comes after expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


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
