"""Whether a server will load a quantized checkpoint, asked before it is started.

Each check is a rule that vLLM 0.33 or transformers 5.23 applies when loading, often hours after the
file was written; the sentence names the layer or the key.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._checks import check_choice, check_positive
from .._errors import CheckpointError
from ..formats import QuantizedTensor
from . import awq, bitsandbytes, compressed_tensors, gptq
from .checkpoints import CONFIG, Checkpoint
from .conversion import CONV1D_MODELS, STACKED_MODELS, dense_linears, model_dtype
from .dialects import quantized_layers

TARGETS = ("vllm", "transformers")
# Linear layers that servers join into one, which then needs one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# Layers that tensor parallelism splits along K; all others it splits along N.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2",
                "wo", "fc_out")  # fmt: skip


@dataclass
class Validation:
    """errors: what stops the server; notes: what may surprise."""

    target: str
    tp: int
    layers: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    def __str__(self) -> str:
        head = f"{self.layers} quantized layers for {self.target}, tensor parallel {self.tp}: "
        lines = [head + ("ok" if self.ok else f"{len(self.errors)} errors")]
        lines += [f"  error: {error}" for error in self.errors]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def validate(path: str | Path, target: str, *, tp: int = 1) -> Validation:
    """Checks a checkpoint folder for a server; reads headers, scales and fp8 codes.

    Args:
        path: checkpoint folder.
        target: "vllm" or "transformers".
        tp: ranks of tensor parallelism (vLLM).

    Returns:
        Validation: `.ok`, `.errors`, `.notes`.

    Raises:
        CheckpointError: the folder itself is damaged.
    """
    check_choice("validate", "target", target, TARGETS)
    check_positive("validate", tp=tp)
    checkpoint = Checkpoint(path)
    result = Validation(target, tp)
    try:
        found = quantized_layers(checkpoint)
        dtype = model_dtype(checkpoint)
        layers = {name: stored.read(checkpoint, dtype) for name, stored in found.items()}
    except CheckpointError as error:
        result.errors.append(str(error))
        return result
    result.layers = len(layers)
    if layers:
        taken = {key for stored in found.values() for key in stored.keys}
        dense = dense_linears(checkpoint, [n for n in checkpoint.names() if n not in taken])
        check = _Check(checkpoint, layers, dense, tp)
        method = checkpoint.quantization["quant_method"]
        dialect = {compressed_tensors.METHOD: "ct", gptq.METHOD: "gptq", awq.METHOD: "awq",
                   bitsandbytes.METHOD: "bnb"}[method]  # fmt: skip
        for rule in (f"common_{dialect}", target, f"{target}_{dialect}"):
            for (error, text), subjects in _grouped(getattr(check, rule)()).items():
                more = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
                sentence = f"{subjects[0]}{more}: {text}"
                (result.errors if error else result.notes).append(sentence)
    return result


Found = Iterator[tuple[bool, object, str]]  # whether it is an error, layer or file, what is wrong


def _grouped(found: Found) -> dict[tuple[bool, str], list]:
    """The layers that one sentence is about, so that it is said once."""
    groups: dict[tuple[bool, str], list] = {}
    for error, subject, text in found:
        groups.setdefault((error, text), []).append(subject)
    return groups


class _Check:
    """The rules, one method for each dialect and target."""

    def __init__(self, checkpoint: Checkpoint, layers: dict[str, QuantizedTensor],
                 dense: list[str], tp: int):  # fmt: skip
        self.checkpoint, self.layers, self.dense, self.tp = checkpoint, layers, dense, tp
        self.config = checkpoint.quantization
        self.file = checkpoint.path / CONFIG
        self.kind: str = str(checkpoint.config.get("model_type"))

    def _experts(self) -> list[str]:
        return [name for name in self.layers if compressed_tensors.EXPERT.search(name)]

    # --- what every reader of the dialect needs ------------------------------------------------

    def common_ct(self) -> Found:
        for name in self.config.get("ignore") or ():
            if not name.startswith("re:") and name not in self.dense:
                inside = any(key.startswith(f"{name}.") for key in self.checkpoint.names())
                what = "is no leaf module" if inside else "is not in the checkpoint"
                yield True, self.file, f"ignore names {name!r}, which {what}"
        for key, group in self.config["config_groups"].items():
            for target in group.get("targets") or ():
                plain = not target.startswith("re:") and "." in target
                if plain and target not in self.layers:
                    text = f"config group {key} targets {target!r}, which is not quantized"
                    yield True, self.file, text
        groups = compressed_tensors.Groups(self.config, self.file)
        for name in self._dense_linears():
            if groups.scheme(name) is not None:
                yield True, name, "is dense, but a config group targets it: list it in ignore"

    def common_gptq(self) -> Found:
        for key, want in (("desc_act", False), ("sym", True), ("checkpoint_format", "gptq")):
            if self.config.get(key, want) != want:
                text = f"{key} is {self.config[key]!r}: not all servers read it"
                yield False, self.file, text
        for name, qt in self.layers.items():
            if qt.zero_point is not None:
                yield False, name, "asymmetric zero points: not all servers read them"

    def common_awq(self) -> Found:
        skip = self.config.get("modules_to_not_convert") or ()
        for name in self._dense_linears():
            if name != "lm_head" and not any(key in name for key in skip):
                yield True, name, f"is dense: list it in modules_to_not_convert of {self.file}"
        for name in self.layers:
            if f"{name}.qzeros" not in self.checkpoint:
                yield True, name, "has no qzeros, which every reader but this one asks for"

    def common_bnb(self) -> Found:
        skip = self.config.get("llm_int8_skip_modules") or ()
        for name in self._dense_linears():
            if not any(name.endswith(key) for key in skip):
                yield True, name, f"is dense: list it in llm_int8_skip_modules of {self.file}"

    def _dense_linears(self) -> Iterator[str]:
        for name in self.dense:
            leaf = name.rpartition(".")[2]
            embedding = "embed" in leaf or leaf in ("wte", "wpe", "shared")
            if f"{name}.weight" in self.checkpoint and not embedding:
                yield name

    # --- vLLM -------------------------------------------------------------------------------------

    def vllm(self) -> Found:
        yield from self._fused()
        for name, qt in self.layers.items():
            leaf = name.rpartition(".")[2]
            row = leaf in ROW_PARALLEL
            split, size = ("K", qt.shape[1]) if row else ("N", qt.shape[0])
            if leaf in ("k_proj", "v_proj"):
                continue  # whole heads are repeated where there are fewer than ranks
            if size % self.tp:
                yield True, name, f"{split} = {size} does not divide by {self.tp} ranks"
            elif (
                row and qt.format != "nf4" and qt.group_size > 0 and self._part(qt) % qt.group_size
            ):
                text = f"groups of {qt.group_size} do not divide K / tp = {self._part(qt)}"
                yield True, name, text

    def _part(self, qt: QuantizedTensor) -> int:
        """Inputs of one rank where K is split."""
        return qt.shape[1] // self.tp

    def _fused(self) -> Found:
        names = {*self.layers, *self.dense}
        for first in sorted(names):
            parent, _, leaf = first.rpartition(".")
            for group in FUSED:
                members = [f"{parent}.{other}" for other in group if f"{parent}.{other}" in names]
                schemes = {name.rpartition(".")[2]: self._scheme(name) for name in members}
                if leaf == group[0] and len(set(schemes.values())) > 1:
                    listed = ", ".join(f"{name} {scheme}" for name, scheme in schemes.items())
                    yield True, parent, f"layers that are fused need one scheme: {listed}"

    def _scheme(self, name: str) -> str:
        qt = self.layers.get(name)
        if qt is None:
            return "dense"
        kind = "" if qt.zero_point is None else " asymmetric"
        return f"{qt.format}{kind} in groups of {qt.group_size}"

    def vllm_ct(self) -> Found:
        if self.config.get("sparsity_config"):
            yield True, self.file, "sparsity_config is refused: leave it out"
        for key, group in self.config["config_groups"].items():
            layout = group.get("format") or self.config.get("format")
            if layout == "int-quantized" and not group.get("input_activations"):
                text = "int-quantized without input_activations: convert it to pack-quantized"
                yield True, self.file, f"config group {key}: {text}"
        if self.kind == "gpt_oss":
            for name in self._experts():
                yield True, name, "vLLM 0.33 reads no experts of gpt_oss that were quantized so"
        groups = compressed_tensors.Groups(self.config, self.file)
        packed = {name: qt for name, qt in self.layers.items()
                  if groups.scheme(name).layout == "pack-quantized"}  # fmt: skip
        yield from self._marlin(packed)
        yield from self._rounded_scales(packed)
        for name, qt in self.layers.items():
            if qt.format == "fp8" and qt.group_size == 128 and qt.shape[1] % 128:
                yield True, name, f"blocks of 128 do not divide K = {qt.shape[1]}"

    def vllm_gptq(self) -> Found:
        for name, qt in self.layers.items():
            if qt.group_size not in (-1, 32, 64, 128):
                yield True, name, f"group size must be -1, 32, 64 or 128, got {qt.group_size}"
        yield from self._marlin(self.layers)

    def vllm_awq(self) -> Found:
        marlin = self.config.get("zero_point", True)
        for name, qt in self.layers.items():
            if qt.group_size not in (-1, 32, 64, 128):
                marlin = False
                text = f"groups of {qt.group_size} have the slow kernel, which takes float16 alone"
                yield qt.dtype != torch.float16, name, text
        if not self.config.get("zero_point", True):
            text = "zero_point is False: the slow kernel, which takes float16 alone"
            yield False, self.file, text
        if marlin:
            yield from self._marlin(self.layers)

    def _marlin(self, layers: dict[str, QuantizedTensor]) -> Found:
        for name, qt in layers.items():
            (n, k), row = qt.shape, name.rpartition(".")[2] in ROW_PARALLEL
            n, k = (n, self._part(qt)) if row else (n // self.tp, k)
            if n % 64 or k % 128:
                yield False, name, f"{n} x {k} a rank is not a multiple of 64 x 128, as Marlin asks"

    def _rounded_scales(self, layers: dict[str, QuantizedTensor]) -> Found:
        for name, qt in layers.items():
            if qt.scale.dtype == torch.float32 and qt.dtype != torch.float32:
                yield False, name, f"fp32 scales are rounded to {qt.dtype} when loaded"

    def vllm_bnb(self) -> Found:
        if self.tp > 1:
            yield True, self.file, f"bitsandbytes weights cannot be split over {self.tp} ranks"
        yield False, self.file, "bitsandbytes runs on CUDA alone"

    # --- transformers -----------------------------------------------------------------------------

    def transformers(self) -> Found:
        if self.tp > 1:
            yield False, self.file, f"{self.tp} ranks are not checked for transformers"

    def transformers_ct(self) -> Found:
        if self.kind in CONV1D_MODELS:
            yield True, self.file, "Conv1D layers do not load from compressed-tensors"
        groups = compressed_tensors.Groups(self.config, self.file)
        for name in self._experts():
            if self.kind.startswith("llama4"):
                continue  # transformers takes its stacks apart itself
            if self.kind.removesuffix("_text") in STACKED_MODELS:
                yield True, name, f"transformers 5.23 reads no quantized experts of {self.kind}"
            elif groups.scheme(name).rounds_to_int8:
                yield True, name, "transformers 5.23 reads no experts with 8-bit activations"
        for name, qt in self.layers.items():
            if qt.zero_point is not None:
                text = "packed zero points do not load (compressed-tensors 0.20)"
                yield True, name, f"{text}: quantize symmetrically"
        yield from self._rounded_scales(self.layers)

    def transformers_gptq(self) -> Found:
        yield False, self.file, "GPTQ needs the packages optimum and gptqmodel"

    def transformers_awq(self) -> Found:
        yield False, self.file, "AWQ needs the packages gptqmodel and accelerate"
        if any(qt.dtype == torch.bfloat16 for qt in self.layers.values()):
            yield False, self.file, "bfloat16 models are computed in float16 on a GPU"

    def transformers_bnb(self) -> Found:
        for name, qt in self.layers.items():
            if qt.format == "nf4" and qt.shape[1] % qt.group_size:
                text = f"K = {qt.shape[1]} is no multiple of {qt.group_size}"
                yield False, name, f"{text}: on a CPU, bitsandbytes 0.50 gets it wrong or refuses"
