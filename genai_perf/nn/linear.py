"""QuantLinear: nn.Linear that computes from a quantized weight."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from .._checks import fail
from .._errors import CheckpointError
from ..formats import QuantizedTensor, get
from ..formats.base import COMPONENTS, FLOATS
from ..ops.quant_matmul import outliers, quant_matmul
from ..ops.quantize import check_search, quantize

_ELSEWHERE = object()


@dataclass(frozen=True)
class QuantConfig:
    """A format and its options, as the keywords of `genai_perf.quantize`.

    activations: "int8" to round those of each token too, before they meet int8 weights, or those of
        each group of columns, before they meet int4 weights; "fp8" likewise before fp8 weights;
        of `quant_matmul`.
    threshold: with it, columns of activations this large stay as they are; of `quant_matmul`.
    search: choose the scales of int4, int3 and int2 for the least squared error.
    """

    format: str
    group_size: int | None = None
    double_quant: bool = False
    symmetric: bool = True
    granularity: str | None = None
    scale_dtype: torch.dtype | None = None
    activations: str | None = None
    threshold: float = 0.0
    search: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self):
        get(self.format).spec(**self._options())
        check_search(get(self.format), self.search)
        meets = {None: (self.format,), "int8": ("int8", "int4"), "fp8": ("fp8", "fp8_240")}
        if self.format not in meets.get(self.activations, ()):
            fail("QuantConfig", "activations",
                 "None, or 'int8' with the format int8 or int4, or 'fp8' with fp8 or fp8_240",
                 f"{self.activations!r} with {self.format}")  # fmt: skip
        outliers.check(self.activations, self.threshold, self.format)

    def quantize(self, weight: torch.Tensor,
                 importance: torch.Tensor | None = None) -> QuantizedTensor:  # fmt: skip
        """`weight` (N, K); importance: of `genai_perf.quantize`, needs `search`."""
        return quantize(weight, self.format, search=self.search, importance=importance,
                        **self._options())  # fmt: skip

    def _options(self) -> dict:
        mine = ("format", "activations", "threshold", "search")
        return {name: value for name, value in asdict(self).items() if name not in mine}

    @classmethod
    def of(cls, config: "str | QuantConfig") -> "QuantConfig":
        return config if isinstance(config, cls) else cls(config)


class QuantizedWeight(nn.Module):
    """The components of a QuantizedTensor as buffers, `qdata`, `scale`, ..., and `meta`.

    `.to(dtype)` changes what `dtype` says and never the components; `.to(device)` moves them.
    """

    def __init__(self, qweight: QuantizedTensor):
        super().__init__()
        for name in (*COMPONENTS, "meta"):
            self.register_buffer(name, None)
        self._take(qweight)

    def _take(self, qweight: QuantizedTensor) -> None:
        self._last: QuantizedTensor | None = None
        self.format, self.group_size = qweight.format, qweight.group_size
        self.shape, self.dtype = qweight.shape, qweight.dtype
        for name in set(COMPONENTS) - qweight.components().keys():
            self._buffers[name] = None
        for name, tensor in qweight.state_dict().items():
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                self._buffers[name] = tensor.to(qweight.device)

    def as_parameters(self) -> None:
        """Makes frozen parameters of the components; see `shardable`."""
        for name in COMPONENTS:
            tensor = self._buffers.get(name)
            if tensor is not None and tensor.dim():
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._last = None

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def tensor(self) -> QuantizedTensor:
        """The quantized weight; its components are the buffers themselves."""
        b, last = self._buffers, self._last
        if self._parameters:
            b = {**b, **self._parameters}
        if torch.compiler.is_compiling():
            return self._tensor(b)
        if (
            last is None
            or b["qdata"] is not last.qdata
            or b["scale"] is not last.scale
            or b["zero_point"] is not last.zero_point
            or b["nested_scale"] is not last.nested_scale
            or b["scale_offset"] is not last.scale_offset
            or self.dtype != last.dtype
        ):
            last = self._last = self._tensor(b)
        return last

    def _tensor(self, b: dict) -> QuantizedTensor:
        return QuantizedTensor(self.format, self.shape, self.dtype, b["qdata"], b["scale"],
                               b["zero_point"], self.group_size, b["nested_scale"],
                               b["scale_offset"])  # fmt: skip

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = _moved(buffer, fn)
        for name, parameter in self._parameters.items():
            self._parameters[name] = nn.Parameter(_moved(parameter.data, fn), requires_grad=False)
        asked = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        if asked != self.dtype and asked in FLOATS:
            self.dtype = asked
            state = self.tensor().state_dict()
            self.meta = state["meta"].to(self.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict,
                              missing_keys, unexpected_keys, error_msgs):  # fmt: skip
        ours = {key for key in state_dict if key.startswith(prefix)}
        needed = {prefix + name for name in ("qdata", "scale", "meta")}
        if not needed <= ours:
            missing_keys.extend(sorted(needed - ours))
            return
        unexpected_keys.extend(sorted(ours - {prefix + n for n in (*COMPONENTS, "meta")}))
        try:
            loaded = QuantizedTensor.from_state_dict(state_dict, prefix)
        except CheckpointError as error:
            error_msgs.append(str(error))
            return
        if loaded.shape != self.shape:
            error_msgs.append(f"quantized tensor: {prefix}meta must be of shape "
                              f"{tuple(self.shape)}, got {tuple(loaded.shape)}")  # fmt: skip
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            loaded = loaded.to(self.device)
            for name, tensor in loaded.components().items():
                setattr(loaded, name, tensor.clone())
        self._take(loaded)

    def extra_repr(self) -> str:
        qweight = self.tensor()
        bits = 8 * qweight.nbytes / max(1, self.shape.numel())
        return (
            f"{self.format}, shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"{qweight.nbytes} bytes, {bits:.2f} bits a weight"
        )


def _moved(tensor: torch.Tensor, fn) -> torch.Tensor:
    """What `fn` makes of the tensor, but in its own dtype."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def shardable(model: nn.Module) -> nn.Module:
    """Prepares quantized layers for `torch.distributed.fsdp.fully_shard`, in place.

    FSDP2 shards parameters and leaves buffers whole on every rank. This makes frozen parameters of
    the codes and scales of every quantized layer and stack of experts; call it before
    `fully_shard`. Names in the state dict stay as they are.

    Raises:
        ValueError: the model has no quantized layer.
    """
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    if not weights:
        fail("shardable", "model", "one with quantized layers", type(model).__name__)
    for weight in weights:
        weight.as_parameters()
    return model


class QuantLinear(nn.Module):
    """y = x @ dequant(W)^T + bias with W kept quantized, in the place of nn.Linear.

    state_dict holds plain tensors: `weight.qdata`, `weight.scale`, ..., `weight.meta` and `bias`.
    x and bias get gradients, the weight none.

    Args:
        in_features, out_features: K and N.
        qweight: quantized weight of shape (N, K).
        bias: (N) or None; a Parameter is kept as it is.
        activations, threshold, backend: of `quant_matmul`; backend None: the best that runs.
    """

    def __init__(self, in_features: int, out_features: int, qweight: QuantizedTensor,
                 bias: torch.Tensor | None = None, *, activations: str | None = None,
                 threshold: float = 0.0, backend: str | None = None):  # fmt: skip
        super().__init__()
        if tuple(qweight.shape) != (out_features, in_features):
            fail("QuantLinear", "qweight", f"of shape {(out_features, in_features)}",
                 f"shape {tuple(qweight.shape)}")  # fmt: skip
        if bias is not None and tuple(bias.shape) != (out_features,):
            fail("QuantLinear", "bias", f"of shape {(out_features,)}", f"shape {tuple(bias.shape)}")
        self.in_features, self.out_features = in_features, out_features
        self.activations, self.threshold, self.backend = activations, threshold, backend
        self.weight = QuantizedWeight(qweight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_float(cls, linear: nn.Module, config: str | QuantConfig, *,
                   importance: torch.Tensor | None = None) -> "QuantLinear":  # fmt: skip
        """A quantized copy of an nn.Linear, or of transformers' Conv1D (weight stored (K, N)).

        Args:
            linear: the layer; it is left as it is, and its bias is shared.
            config: a format name, such as "nf4", or a QuantConfig.
            importance: (in_features,), of `genai_perf.quantize`; needs a config with `search`.

        Raises:
            ValueError: another kind of layer, or a weight with an infinity or NaN.
        """
        weight = dense_weight(linear)
        if weight is None:
            fail("QuantLinear", "linear", "an nn.Linear or a Conv1D", type(linear).__name__)
        n, k = weight.shape
        config = QuantConfig.of(config)
        qweight = config.quantize(weight, importance)
        return cls(k, n, qweight, linear.bias, activations=config.activations,
                   threshold=config.threshold)  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Past nn.Module's own look-up of attributes, 1 us a call.
        bias = self._parameters.get("bias", _ELSEWHERE)
        if bias is _ELSEWHERE:
            bias = self.bias  # parametrized
        return quant_matmul(x, self._modules["weight"].tensor(), bias,
                            activations=self.activations, threshold=self.threshold,
                            backend=self.backend)  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
            + (f", activations={self.activations}" if self.activations else "")
            + (f", threshold={self.threshold}" if self.threshold else "")
        )


def dense_weight(module: nn.Module) -> torch.Tensor | None:
    """The (N, K) weight of an nn.Linear or of transformers' Conv1D; None for anything else."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2:
        return module.weight.detach().T.contiguous()
    return None
