"""Checkpoints and calls for serving on Neuron: NxDI, the vLLM Neuron plug-in, optimum-neuron.

fp8 on trn1 and trn2 ends at 240: codes are written as float8_e4m3fn with values up to 240, where
its bits are those of the chips' own e4m3.
"""

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from .._checks import check_choice, check_ndim, check_positive, fail

FP8_MAX = 240.0
SMALLEST_SCALE = 1e-12
_GONE = (
    "transformers-neuronx is not installed; its support ended with Neuron SDK 2.26: serve with "
    "vLLM on trn2 and trn3, or export with optimum-neuron for inf2 and trn1"
)


def quantize_static(weight: torch.Tensor, dtype: str, *, per_channel: bool = True):
    """(codes, scale fp32): W = codes * scale, as Neuron's own tools have it.

    Args:
        weight: (out_features, in_features), finite.
        dtype: "int8" (scale = absmax / 127) or "f8e4m3" (absmax / 240).
        per_channel: a scale (out_features, 1); else one for the tensor, (1,).

    Raises:
        ValueError: another dtype or shape, or a value that is not finite.
    """
    check_choice("quantize_static", "dtype", dtype, ("int8", "f8e4m3"))
    check_ndim("quantize_static", 2, "(out_features, in_features)", weight=weight)
    x, limit = weight.float(), 127.0 if dtype == "int8" else FP8_MAX
    if not torch.isfinite(x).all():
        fail("quantize_static", "weight", "finite", "inf or NaN")
    absmax = x.abs().amax(1, keepdim=True) if per_channel else x.abs().amax().reshape(1)
    scale = (absmax / limit).clamp(min=SMALLEST_SCALE)
    codes = (x / scale).clamp(-limit, limit)
    return (
        codes.round().to(torch.int8) if dtype == "int8" else codes.to(torch.float8_e4m3fn)
    ), scale


def nxdi_state_dict(state: Mapping[str, torch.Tensor], layers: Iterable[str], dtype: str, *,
                    per_channel: bool = True) -> dict[str, torch.Tensor]:  # fmt: skip
    """A state dict with `<layer>.weight` quantized and `<layer>.scale` beside it, NxDI's layout.

    Args:
        state: names to tensors; what is not in `layers` stays.
        layers: names of linear layers, without ".weight".
        dtype, per_channel: as in `quantize_static`.

    Raises:
        ValueError: a layer has no weight in `state`.
    """
    result = dict(state)
    for layer in layers:
        if f"{layer}.weight" not in state:
            fail("nxdi_state_dict", "layers", "names of layers with a weight", repr(layer))
        codes, scale = quantize_static(state[f"{layer}.weight"], dtype, per_channel=per_channel)
        result[f"{layer}.weight"], result[f"{layer}.scale"] = codes, scale
    return result


def nxdi_config(dtype: str, skipped: Iterable[str], path: str, *, per_channel: bool = True) -> dict:
    """The keywords of NxDI's NeuronConfig that load such a checkpoint."""
    check_choice("nxdi_config", "dtype", dtype, ("int8", "f8e4m3"))
    kind = "per_channel_symmetric" if per_channel else "per_tensor_symmetric"
    return {
        "quantized": True,
        "quantized_checkpoints_path": path,
        "quantization_dtype": dtype,
        "quantization_type": kind,
        "modules_to_not_convert": sorted(skipped),
    }


def modelopt_state_dict(state: Mapping[str, torch.Tensor], layers: Mapping[str, float],
                        ) -> dict[str, torch.Tensor]:  # fmt: skip
    """Static fp8, one scale a tensor, as the vLLM Neuron plug-in reads it (ModelOpt's layout).

    Args:
        state: names to tensors; what is not in `layers` stays.
        layers: name of a linear layer -> the largest absolute input seen in calibration.

    Raises:
        ValueError: a layer has no weight, or its input's absmax is not positive.
    """
    result = nxdi_state_dict(state, layers, "f8e4m3", per_channel=False)
    for layer, absmax in layers.items():
        check_positive("modelopt_state_dict", **{f"absmax of {layer}": absmax})
        result[f"{layer}.weight_scale"] = result.pop(f"{layer}.scale").reshape(())
        result[f"{layer}.input_scale"] = torch.tensor(absmax / FP8_MAX)
    return result


def modelopt_config(skipped: Iterable[str]) -> dict:
    """`quantization_config` of config.json for `modelopt_state_dict`."""
    return {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None,
            "exclude_modules": sorted(skipped)}  # fmt: skip


def write(folder: Path | str, state: Mapping[str, torch.Tensor], *, skipped: Iterable[str]) -> Path:
    """model.safetensors, and modules_to_not_convert.json in the form NxDI's command line takes."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    names = {"model": {"modules_to_not_convert": sorted(skipped)}}
    (folder / "modules_to_not_convert.json").write_text(json.dumps(names, indent=1) + "\n")
    return folder


def export_optimum(
    model: str,
    folder: Path | str,
    *,
    batch_size: int,
    sequence_length: int,
    tensor_parallel_size: int | None = None,
    instance_type: str | None = None,
):
    # fmt: skip
    """Compile with optimum-neuron and save: get_neuron_config, export, save_pretrained, load again.

    Returns: the model that optimum's from_pretrained gave from `folder`.

    Raises:
        ImportError: optimum-neuron is not installed.
    """
    if not _installed("optimum.neuron"):
        raise ImportError("export_optimum: optimum-neuron is not installed (it needs Python 3.10 "
                          "or 3.11 and its own Neuron SDK)")  # fmt: skip
    kind = import_module("optimum.neuron").NeuronModelForCausalLM
    config = kind.get_neuron_config(
        model, instance_type=instance_type, batch_size=batch_size,
        sequence_length=sequence_length, tensor_parallel_size=tensor_parallel_size,
    )  # fmt: skip
    kind.export(model, config, load_weights=False).save_pretrained(str(folder))
    return kind.from_pretrained(str(folder))


def llama_for_sampling(
    path: str,
    *,
    n_positions: int = 2048,
    batch_size: int = 1,
    amp: str = "bf16",
    tp_degree: int = 2,
):
    """transformers-neuronx's LlamaForSampling, loaded and put on the device; its support has ended.

    For code of its time only: new code serves with vLLM (trn2, trn3) or optimum-neuron.

    Returns: the model, ready for `.sample(input_ids, sequence_length)`.

    Raises:
        ImportError: transformers-neuronx is not installed; says what to use in its place.
    """
    check_choice("llama_for_sampling", "amp", amp, ("f32", "f16", "bf16"))
    if not _installed("transformers_neuronx"):
        raise ImportError(f"llama_for_sampling: {_GONE}")
    kind = import_module("transformers_neuronx").LlamaForSampling
    model = kind.from_pretrained(path, n_positions=n_positions, batch_size=batch_size, amp=amp,
                                 tp_degree=tp_degree)  # fmt: skip
    model.to_neuron()
    return model


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False
