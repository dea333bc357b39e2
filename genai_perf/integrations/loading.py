"""A compressed checkpoint as a transformers model that computes from the packed bytes."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .._errors import CheckpointError
from ..formats import QuantizedTensor, SparseTensor
from ..io.checkpoints import Checkpoint, check_finite
from ..io.dialects import quantized_layers
from ..io.shards import TensorInfo
from ..io.sparse_file import read_sparse
from ..io.stored import Stored
from ..nn import QuantLinear, SparseLinear
from . import skeleton
from .expert_parts import Rows, place_stacks, stacked_biases


def load_compressed(path: str | Path, *, dtype: torch.dtype | None = None,
                    backend: str | None = None) -> nn.Module:  # fmt: skip
    """A transformers model whose quantized linears are `genai_perf.nn.QuantLinear`, and whose
    quantized experts are `genai_perf.nn.QuantizedStack`.

    The packed weights go from the file into the modules as they are; no dense copy is made, when
    loading or when running. Reads compressed-tensors int2 to int4, int8 and fp8, GPTQ int4 and
    int8, AWQ int4, and bitsandbytes nf4, fp4 and int8; activations stay in the model's dtype, also
    where the file asks for 8-bit ones. Where `genai_perf.pack_sparse` left its side file, pruned
    linears are `SparseLinear` and compute from their kept values. A dense folder becomes the model
    that `from_pretrained` gives. Where some experts of a stack are dense in the file, all are read
    dense, with a warning.

    Args:
        path: checkpoint folder.
        dtype: of the computation and of what is not quantized; None: the checkpoint's.
        backend: of `genai_perf.quant_matmul`; None: the best that runs.

    Returns:
        transformers.PreTrainedModel: in eval mode, ready for `generate`; the tokenizer is separate.

    Raises:
        CheckpointError: see `Checkpoint`; also a quantization that genai_perf does not run, a
            missing tensor, an unknown architecture; one sentence that names it.
    """
    checkpoint = Checkpoint(path)
    model = skeleton.build(checkpoint, dtype)
    _place_sparse(checkpoint, model, backend)
    biases = stacked_biases(checkpoint, model)
    experts = place_quantized(checkpoint, model, backend)
    _load_rest(_DenseExperts(checkpoint, experts, biases, model.config.dtype), model)
    _load_generation_config(checkpoint.path, model)
    return model.requires_grad_(False)


# Rows of an ordinary tensor that must agree with the side file.
_COMPARED_ROWS = 16


def _place_sparse(checkpoint: Checkpoint, model: nn.Module, backend: str | None) -> None:
    """Puts a SparseLinear in the place of every linear that the side file holds."""
    prefix = f"{model.base_model_prefix}."
    layers = read_sparse(checkpoint.path)
    quantized = quantized_layers(checkpoint) if layers else {}
    for name, linear in list(model.named_modules()):
        if skeleton.is_linear(linear):
            spellings = (name, name.removeprefix(prefix), prefix + name)
            stored = next((s for s in spellings if s in layers), None)
            if stored is not None:
                weight = layers.pop(stored)
                _check_current(checkpoint, stored, weight, quantized, skeleton.is_conv1d(linear))
                held = {key: tensor.clone() for key, tensor in weight.components().items()}
                weight = replace(weight, dtype=model.config.dtype, **held)
                if weight.values.is_floating_point():
                    weight = replace(weight, values=weight.values.to(model.config.dtype))
                model.set_submodule(name, SparseLinear(weight, linear.bias, backend=backend))
    if layers:
        raise CheckpointError(f"{checkpoint.path}: {next(iter(layers))!r} of the sparse side file "
                              f"is no linear layer of {type(model).__name__}")  # fmt: skip


def _check_current(checkpoint: Checkpoint, name: str, weight: SparseTensor, quantized: dict,
                   transposed: bool) -> None:  # fmt: skip
    """Refuses a side file whose weights are not those of the checkpoint it lies beside."""
    if name in quantized:
        dense = quantized[name].read(checkpoint, weight.dtype).dequantize()
    else:
        dense = checkpoint.tensor(f"{name}.weight")
        dense = dense.T if transposed else dense
    same = dense.shape == weight.shape
    if same:
        rows = torch.linspace(0, max(0, len(dense) - 1), min(len(dense), _COMPARED_ROWS)).long()
        same = torch.equal(weight.to_dense()[rows], dense[rows].to(weight.dtype))
    if not same:
        raise CheckpointError(f"{checkpoint.path}: the sparse side file holds another {name} than "
                              f"the checkpoint: run genai_perf.pack_sparse again")  # fmt: skip


def place_quantized(
    checkpoint: Checkpoint, model: nn.Module, backend: str | None
) -> dict[str, Stored]:
    """Puts a QuantLinear in the place of every linear whose weight the checkpoint has quantized;
    returns the quantized layers that are no linears of the model."""
    prefix = f"{model.base_model_prefix}."
    layers = quantized_layers(checkpoint)
    placed = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    spelt = {s for n in placed for s in (n, n.removeprefix(prefix), prefix + n)}
    layers = {name: stored for name, stored in layers.items() if name not in spelt}
    for name, linear in list(model.named_modules()):
        if skeleton.is_linear(linear):
            spellings = (name, name.removeprefix(prefix), prefix + name)
            stored = next((layers.pop(s) for s in spellings if s in layers), None)
            if stored is not None:
                qweight = stored.read(checkpoint, model.config.dtype)
                model.set_submodule(name, _quant_linear(name, linear, qweight, backend))
    place_stacks(checkpoint, model, layers, backend)
    return layers


class _DenseExperts:
    """A checkpoint whose quantized experts are read as the dense ones that they stand for, and
    whose biases of experts as their stack."""

    def __init__(self, checkpoint: Checkpoint, experts: dict[str, Stored], biases: dict[str, Rows],
                 dtype: torch.dtype):  # fmt: skip
        self.path, self._checkpoint, self.dtype = checkpoint.path, checkpoint, dtype
        self._dense = {f"{name}.weight": stored for name, stored in experts.items()}
        self._biases = biases
        self._keys = {key for stored in experts.values() for key in stored.keys}
        self._keys |= {part for one in biases.values() for parts in one.parts for part in parts}

    def names(self) -> list[str]:
        others = [name for name in self._checkpoint.names() if name not in self._keys]
        return [*others, *self._dense, *self._biases]

    def info(self, name: str) -> TensorInfo:
        if name in self._dense:
            first = self._dense[name].keys[0]
        elif name in self._biases:
            first = self._biases[name].parts[0][0]
        else:
            return self._checkpoint.info(name)
        tensor = self.tensor(name)
        return replace(self._checkpoint.info(first), shape=tuple(tensor.shape), dtype=tensor.dtype,
                       nbytes=tensor.nbytes)  # fmt: skip

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._dense:
            return self._dense[name].read(self._checkpoint, self.dtype).dequantize()
        if name in self._biases:
            return self._biases[name].read(self._checkpoint)
        return self._checkpoint.tensor(name)

    def check_used(self, used: set[str], model: nn.Module) -> None:
        """Raises CheckpointError where the model has no place for a quantized layer."""
        for name in self._dense.keys() - used:
            layer = name.removesuffix(".weight")
            raise CheckpointError(f"{self.path}: {layer!r} is quantized, and is no linear layer "
                                  f"of {type(model).__name__}")  # fmt: skip


def _quant_linear(name: str, linear: nn.Module, qweight: QuantizedTensor,
                  backend: str | None) -> QuantLinear:  # fmt: skip
    """The module that takes the place of `linear`; its bytes leave the mapped file, aligned."""
    weight = linear.weight.T if skeleton.is_conv1d(linear) else linear.weight
    if weight.shape != qweight.shape:
        raise CheckpointError(f"{name}.weight: must have shape {list(weight.shape)}, "
                              f"got {list(qweight.shape)}")  # fmt: skip
    n, k = weight.shape
    return QuantLinear(k, n, qweight.own(), linear.bias, backend=backend)


def _load_rest(checkpoint: _DenseExperts, model: nn.Module) -> None:
    """Everything that is not in place yet: embeddings, norms, biases, skipped linears, experts."""
    names, dtype = skeleton.Names(checkpoint, model), checkpoint.dtype
    stored = (source for name, _ in skeleton.stored(model) for source in names.find(name))
    checkpoint.check_used(set(stored), model)
    for name, tensor in list(skeleton.stored(model)):
        if tensor.device.type == "meta":
            value = names.get(name, tensor.shape)
            check_finite(name, value)
            skeleton.assign(model, name, value.to(dtype, copy=True))
    model.tie_weights()


def _load_generation_config(folder: Path, model: nn.Module) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{folder / 'generation_config.json'}: {reason}") from error
