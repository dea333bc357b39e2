"""`patch`: one line that moves a transformers model to this package, and says what it moved."""

import inspect
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from .._checks import fail
from ..nn import QuantConfig, QuantizationRecord, quantize_model
from ..nn.model import DEFAULT_SKIP
from .attention import NAME


@dataclass(frozen=True)
class Patch:
    """What `patch` changed; print it.

    attention: for each model (its name among the modules, "" the model itself) the implementation
        it had before; modules: how many attention modules of each class follow it now;
    linears: which linear layers were quantized; None: none was asked for.
    """

    attention: dict[str, str] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    linears: QuantizationRecord | None = None

    def __str__(self) -> str:
        lines = [
            f"attention of {name or 'the model'}: {before} -> {NAME}"
            for name, before in self.attention.items()
        ]
        lines += [f"  {count} x {name}" for name, count in self.modules.items()]
        lines.append("linears: unchanged" if self.linears is None else f"linears: {self.linears}")
        return "\n".join(lines)


def patch(model: nn.Module, *, linear: str | QuantConfig | None = None,
          skip: Collection[str] = DEFAULT_SKIP) -> nn.Module:  # fmt: skip
    """Run the attention of a transformers model with `genai_perf.attention`, in place.

    Args:
        model: a transformers model, or a module that contains some.
        linear: a format, such as "nf4", or a QuantConfig: also quantize the linear layers, see
            `quantize_model`. None leaves them as they are.
        skip: of `quantize_model`.

    Returns:
        The model, with `model.genai_perf_patch` (Patch), which can be printed. Patching a patched
        model changes nothing; `unpatch` takes the attention back.

    Raises:
        ValueError: not a transformers model; one whose attention cannot be exchanged (named), which
            is left as it was; and see `quantize_model`.
    """
    from . import transformers  # noqa: F401  (registers the name)

    done = getattr(model, "genai_perf_patch", None)
    models = _models(model)
    for name, part in models.items():
        if not part._can_set_attn_implementation():
            fail("patch", "model", "of classes that look their attention up in transformers' "
                 "AttentionInterface", f"{type(part).__name__} at {name or 'the top'}")  # fmt: skip
    if linear is not None and done is not None and done.linears is not None:
        fail("patch", "linear", "None: the linears are patched already", repr(linear))
    before = {name: part.config._attn_implementation for name, part in models.items()}
    _set(models, dict.fromkeys(models, NAME))
    record = None if done is None else done.linears
    if linear is not None:
        try:
            model = quantize_model(model, linear, skip=skip)
        except ValueError:
            _set(models, before)
            raise
        record = model.quantization_record
    changed = {name: old for name, old in before.items() if old != NAME}
    if done is not None:
        changed = {**changed, **done.attention}
    model.genai_perf_patch = Patch(changed, _attention_modules(model), record)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a patched model the attention it had before; returns it.

    Raises:
        ValueError: the model is not patched, or its linears were quantized: the dense weights are
            gone.
    """
    done = getattr(model, "genai_perf_patch", None)
    if done is None:
        fail("unpatch", "model", "one that was patched", type(model).__name__)
    if done.linears is not None:
        count = len(done.linears.quantized)
        fail("unpatch", "model", "one whose linears were left alone",
             f"{count} quantized layers, whose dense weights are gone")  # fmt: skip
    _set(_models(model), done.attention)
    del model.genai_perf_patch
    return model


def _models(model: nn.Module) -> dict[str, nn.Module]:
    """The transformers models in `model`, itself included, one for each config."""
    from transformers import PreTrainedModel

    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            found[name] = module
    if not found:
        fail("patch", "model", "a transformers model", type(model).__name__)
    return found


def _set(models: dict[str, nn.Module], implementations: dict[str, str]) -> None:
    for name, implementation in implementations.items():  # outer ones first: they set inner ones
        models[name].set_attn_implementation(implementation)
    for name, implementation in implementations.items():
        config = models[name].config
        if config._attn_implementation != implementation:
            config._attn_implementation = implementation


def _attention_modules(model: nn.Module) -> dict[str, int]:
    counts = Counter(
        type(module).__name__ for module in model.modules() if _looks_attention_up(type(module))
    )
    return dict(counts)


def _looks_attention_up(kind: type[nn.Module]) -> bool:
    if not re.search("attention", kind.__name__, re.IGNORECASE):
        return False
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
