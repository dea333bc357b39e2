"""The compressed-tensors dialect (llm-compressor, vLLM): int2 to int4, int8 and fp8 weights.

    pack-quantized   weight_packed int32 (N, ceil(bits*K/32)), weight_shape int64 (2,),
                     weight_zero_point int32 (ceil(bits*N/32), K/g) when asymmetric, packed along N
    int-quantized    weight int8 (N, K)
    float-quantized  weight float8_e4m3fn (N, K)
    all              weight_scale: (N, K/g) groups, (N, 1) rows, (1,) tensor, (N/128, K/128) blocks

Codes are unsigned in the packed words (q + 2^(bits-1)), a row one little-endian bit stream, so that
bytes of int2 to int4 are `QuantizedTensor`'s own. Source: compressed-tensors 0.20, `compressors/`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from .._checks import check_choice
from .._errors import CheckpointError
from ..formats import QuantizedTensor
from ..formats.base import FLOATS
from ..formats.int4 import pack, unpack
from .checkpoints import CONFIG, Checkpoint
from .packing import expect, row_bytes, transposed, words
from .stored import Stored

METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the library whose layout this is
INT8_LAYOUTS = ("int-quantized", "pack-quantized")
BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp8": 8}
_PACKED = ("int2", "int3", "int4")
EXPERT = re.compile(r"\.experts\.\d+\.")
_STRATEGIES = {"channel": -1, "tensor": 0, "block": 128}  # -> QuantizedTensor.group_size
_GROUP_SIZES = {size: name for name, size in _STRATEGIES.items()}


class Scheme(NamedTuple):
    """How one layer is stored: the format, its grouping, and the layout in the file; `activations`:
    a server rounds its inputs to 8 bits of the same kind, a scale a token or a group of columns."""

    format: str
    group_size: int
    symmetric: bool
    layout: str
    activations: bool = False

    @property
    def rounds_to_int8(self) -> bool:
        return self.activations and self.format == "int8"

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a layer, by the last part of their names."""
        if self.layout != "pack-quantized":
            return ("weight", "weight_scale")
        zero = () if self.symmetric else ("weight_zero_point",)
        return ("weight_packed", "weight_scale", "weight_shape", *zero)


def scheme(qt: QuantizedTensor, *, int8: str = "int-quantized") -> Scheme:
    """The scheme under which `encode` stores `qt`.

    Args:
        qt: weight (N, K) in int2, int3, int4, int8 or fp8.
        int8: "int-quantized" or "pack-quantized", for int8 weights; both are weight-only and give
            the same values. vLLM serves weight-only int8 from "pack-quantized" alone.

    Raises:
        CheckpointError: a format, or a group size, that this dialect cannot hold.
    """
    check_choice("compressed-tensors", "int8", int8, INT8_LAYOUTS)
    if qt.format not in BITS or len(qt.shape) != 2:
        raise CheckpointError(f"{METHOD} cannot hold {qt.format} of shape {list(qt.shape)}: it "
                              f"takes 2-d weights in {', '.join(BITS)}")  # fmt: skip
    layout = {"fp8": "float-quantized", "int8": int8}.get(qt.format, "pack-quantized")
    return Scheme(qt.format, qt.group_size, qt.zero_point is None, layout)


def encode(name: str, qt: QuantizedTensor, *,
           int8: str = "int-quantized") -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors that stand for the weight of the linear layer `name`.

    Args:
        name: the module's full name, such as model.layers.0.mlp.up_proj.
        qt: its weight (N, K); scales are written in the dtype that they have.
        int8: see `scheme`.

    Returns:
        dict: tensor name -> tensor; bytes are shared with `qt` where the layouts agree.

    Raises:
        CheckpointError: see `scheme`; also a group size that does not divide K.
    """
    found = scheme(qt, int8=int8)
    k = qt.shape[1]
    if qt.format in _PACKED and qt.group_size > 0 and k % qt.group_size:
        raise CheckpointError(f"{name}: {METHOD} needs a group size that divides the {k} columns, "
                              f"got {qt.group_size}")  # fmt: skip
    scale = qt.scale.reshape(1) if found.format == "fp8" and qt.group_size == 0 else qt.scale
    tensors = {f"{name}.weight_scale": scale.contiguous()}
    if found.layout != "pack-quantized":
        return {f"{name}.weight": qt.qdata, **tensors}
    row = qt.qdata if found.format in _PACKED else qt.qdata.view(torch.uint8) ^ 128
    tensors[f"{name}.weight_packed"] = words(row)
    tensors[f"{name}.weight_shape"] = torch.tensor(list(qt.shape), dtype=torch.int64)
    if qt.zero_point is not None:
        tensors[f"{name}.weight_zero_point"] = transposed(
            words(pack(qt.zero_point.T, BITS[qt.format]))
        )
    return tensors


def decode(name: str, tensors: Mapping[str, torch.Tensor],
           scheme: Scheme) -> QuantizedTensor:  # fmt: skip
    """The weight of the linear layer `name`, from the tensors that `encode` describes.

    Args:
        name: the module's full name.
        tensors: at least the tensors `<name>.<part>` for `scheme.parts`.
        scheme: how it is stored, see `Groups.scheme`.

    Returns:
        QuantizedTensor: it dequantizes to the dtype of the stored scale.

    Raises:
        CheckpointError: a tensor has another shape or dtype than the scheme says.
    """
    parts = {part: tensors[f"{name}.{part}"] for part in scheme.parts}
    scale, zero, bits = parts["weight_scale"], None, BITS[scheme.format]
    if scheme.layout == "pack-quantized":
        shape = parts["weight_shape"]
        if shape.is_floating_point() or shape.numel() != 2 or int(shape.min()) < 0:
            raise CheckpointError(f"{name}.weight_shape: must be two sizes, got {shape.tolist()}")
        n, k = shape.flatten().tolist()
        packed = parts["weight_packed"]
        expect(f"{name}.weight_packed", packed, (torch.int32,), (n, -(-k * bits // 32)))
        row = row_bytes(packed)[:, : -(-k * bits // 8)]
        qdata = row if bits < 8 else (row ^ 128).view(torch.int8)
        if not scheme.symmetric:
            groups = scale.shape[-1]
            zeros = parts["weight_zero_point"]
            expect(f"{name}.weight_zero_point", zeros, (torch.int32,), (-(-n * bits // 32), groups))
            zero = transposed(unpack(row_bytes(transposed(zeros)), n, bits))
    else:
        qdata = parts["weight"]
        if qdata.dim() != 2:
            raise CheckpointError(f"{name}.weight: must be 2-d, got {list(qdata.shape)}")
        n, k = qdata.shape
    dtype = scale.dtype
    if dtype not in FLOATS:
        raise CheckpointError(f"{name}.weight_scale: must be floating point, got {dtype}")
    if scheme.group_size == 0:
        scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    if scheme.format not in _PACKED:  # whose scale keeps the dtype of the file
        scale = scale.float()
    qt = QuantizedTensor(scheme.format, torch.Size((n, k)), dtype, qdata, scale, zero,
                         group_size=scheme.group_size)  # fmt: skip
    qt.check(f"{name}.weight: ")
    return qt


def find(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The quantized linear layers of a checkpoint in this dialect.

    Raises:
        CheckpointError: a config group that genai_perf cannot run, a layer with packed tensors that
            no group covers, or one that lacks a tensor.
    """
    groups = Groups(checkpoint.quantization, checkpoint.path / CONFIG)
    found = {}
    for key in checkpoint.names():
        if key.endswith(".weight_scale"):
            name = key.removesuffix(".weight_scale")
            if (scheme := groups.scheme(name)) is None:
                raise CheckpointError(f"{checkpoint.path / CONFIG}: no config group targets "
                                      f"{name!r}, which is quantized")  # fmt: skip
            keys = tuple(f"{name}.{part}" for part in scheme.parts)
            found[name] = Stored(keys, partial(decode, name, scheme=scheme))
    return found


def quantization_config(layers: Mapping[str, Scheme], ignore: Iterable[str]) -> dict:
    """The `quantization_config` of config.json: one group for each scheme.

    Args:
        layers: module name -> scheme of every quantized layer.
        ignore: names of all linear layers that are not quantized, lm_head among them.

    Returns:
        dict: with targets ["Linear"] where one scheme serves all layers that are not ignored (which
        servers look for in mixtures of experts), with every layer's name where there are several.
        Experts, which transformers reads under one scheme, are a pattern then.
    """
    if not layers:
        raise ValueError("quantization_config: no layer is quantized")
    schemes = list(dict.fromkeys(layers.values()))
    groups = {}
    for i, found in enumerate(schemes):
        names = [name for name, other in layers.items() if other == found]
        if all(found == other for name, other in layers.items() if EXPERT.search(name)):
            ours = [name for name in names if not EXPERT.search(name)]
            names = ours + ([f"re:.*{EXPERT.pattern}.*"] if len(ours) < len(names) else [])
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "format": found.layout,
            "weights": _arguments(found),
            "input_activations": _inputs(found) if found.activations else None,
            "output_activations": None,
        }
    layouts = {found.layout for found in schemes}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def _arguments(found: Scheme) -> dict:
    strategy = _GROUP_SIZES.get(found.group_size, "group")
    if found.format in _PACKED and found.group_size > 0:
        strategy = "group"
    return {
        "num_bits": BITS[found.format],
        "type": "float" if found.format == "fp8" else "int",
        "symmetric": found.symmetric,
        "strategy": strategy,
        "group_size": found.group_size if strategy == "group" else None,
        "block_structure": [128, 128] if strategy == "block" else None,
        "dynamic": False,
        "actorder": None,
    }


def _inputs(found: Scheme) -> dict:
    """How a server rounds the inputs of a layer while it runs."""
    kind = "float" if found.format == "fp8" else "int"
    said = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True}
    if found.group_size > 0:
        return said | {"strategy": "group", "group_size": found.group_size}
    return said | {"strategy": "token"}


class Groups:
    """The config groups of a checkpoint: which layer is stored how.

    Args:
        config: `quantization_config` of config.json.
        where: the file, for error messages.

    Raises:
        CheckpointError: a group that genai_perf cannot run, named with its reason.
    """

    def __init__(self, config: Mapping, where: object):
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{where}: quantization_config has no config_groups")
        self.ignore = _patterns(config.get("ignore") or [], f"{where}: ignore")
        self.groups: list[tuple[Scheme, list[Callable[[str, str], bool]]]] = []
        for key, group in groups.items():
            place = f"{where}: config group {key}"
            if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
                raise CheckpointError(f"{place} has no weights")
            layout = group.get("format") or config.get("format")
            found = _parse(group["weights"], layout, place)
            inputs = group.get("input_activations") or {}
            packed = found.format == "int8" and found.layout == "pack-quantized"
            if not packed and inputs.items() >= _inputs(found).items():
                found = found._replace(activations=True)
            self.groups.append((found, _patterns(group.get("targets") or [], place)))

    def scheme(self, name: str, kind: str = "Linear") -> Scheme | None:
        """The scheme of the module `name` of class `kind`; None: it is not quantized."""
        if any(match(name, kind) for match in self.ignore):
            return None
        for found, targets in self.groups:
            if any(match(name, kind) for match in targets):
                return found
        return None


def _parse(weights: Mapping, layout: object, place: str) -> Scheme:
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    group_size = weights.get("group_size")
    symmetric = weights.get("symmetric", True)
    name = {("float", 8): "fp8"} | {("int", BITS[n]): n for n in (*_PACKED, "int8")}
    name = name.get((kind, bits))
    layouts = {"fp8": ("float-quantized", "naive-quantized"),
               "int8": ("pack-quantized", "int-quantized", "naive-quantized"),
               **dict.fromkeys(_PACKED, ("pack-quantized",))}  # fmt: skip
    strategies = {"fp8": tuple(_STRATEGIES), "int8": ("channel",),
                  **dict.fromkeys(_PACKED, ("group", "channel"))}  # fmt: skip
    if strategy is None:
        strategy = "group" if group_size else "tensor"
    reason = None
    if name is None or layout not in layouts[name]:
        reason = f"{bits}-bit {kind} in {layout}"
    elif strategy not in strategies[name]:
        reason = f"{name} weights by {strategy}"
    elif not symmetric and name not in _PACKED:
        reason = f"asymmetric {name} weights"
    elif weights.get("actorder") in ("group", "dynamic"):
        reason = "activation order by group"
    elif strategy == "block" and list(weights.get("block_structure") or ()) != [128, 128]:
        reason = f"blocks of {weights.get('block_structure')}"
    elif strategy == "group" and (not isinstance(group_size, int) or group_size % 8):
        reason = f"groups of {group_size}"
    if reason:
        raise CheckpointError(f"{place}: {reason} is not supported")
    size = group_size if strategy == "group" else _STRATEGIES[strategy]
    return Scheme(name, size, bool(symmetric), layout)


def _patterns(targets: Iterable, place: str) -> list[Callable[[str, str], bool]]:
    """Predicates on (module name, class name): exact names, `re:` patterns, class names."""
    found = []
    for target in targets:
        if not isinstance(target, str):
            raise CheckpointError(f"{place}: targets must be text, got {target!r}")
        if target.startswith("re:"):
            try:
                pattern = re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(f"{place}: {target!r} is no pattern: {error}") from None
            found.append(lambda name, kind, pattern=pattern: pattern.match(name) is not None)
        else:
            found.append(lambda name, kind, target=target: target in (name, kind))
    return found
