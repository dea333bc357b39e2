"""LoRA of PEFT on our quantized layers: train the adapters, merge them, take them out again.

from genai_perf.integrations.peft import get_peft_model
model = get_peft_model(gp.quantize_model(model, "nf4"), LoraConfig(target_modules="all-linear"))
"""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..nn import QuantizedWeight, QuantLinear
from ..ops.quantize import dequantize, quantize_like

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def get_peft_model(model: nn.Module, config: "LoraConfig", *args, **kwargs) -> "PeftModel":
    """`peft.get_peft_model` for a model that holds QuantLinear layers.

    Args:
        model: a model, its layers quantized by `genai_perf.quantize_model` or `load_compressed`.
        config: a LoraConfig without DoRA or another variant; "all-linear" means quantized layers
            too. It is made ready in place (`support`).
        *args, **kwargs: of `peft.get_peft_model`.

    Returns:
        peft.PeftModel: `merge_adapter` rounds weight + adapter to the layer's format, which loses
        what is smaller than its steps; `unmerge_adapter` puts the codes back bit for bit;
        `merge_and_unload` gives the quantized model with the adapter in it.

    Raises:
        ValueError: a variant of LoRA, such as DoRA, on a quantized layer.
    """
    from peft import get_peft_model as plain

    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        config.target_modules = {
            name for name, module in model.named_modules()
            if isinstance(module, QuantLinear | nn.Linear) and module is not head
        }  # fmt: skip
    return plain(model, support(config), *args, **kwargs)


def support(config: "LoraConfig") -> "LoraConfig":
    """A LoraConfig made to know QuantLinear, in place; needed to load an adapter too:

    PeftModel.from_pretrained(model, folder, config=support(PeftConfig.from_pretrained(folder)))
    """
    config._register_custom_module({QuantLinear: _lora_layer()})
    return config


@cache
def _lora_layer() -> type:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoraQuantLinear(nn.Module, LoraLayer):
        """QuantLinear with low-rank adapters beside it (LoRA, arXiv:2106.09685)."""

        def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self.fan_in_fan_out = False
            self._active_adapter = adapter_name
            self._unmerged: list[QuantizedWeight] = []
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return module.in_features, module.out_features

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            base = self.get_base_layer()
            for adapter in check_adapters_to_merge(self, adapter_names):
                if adapter not in self.lora_A:
                    continue
                held = base.weight.tensor()
                merged = dequantize(held, torch.float32) + self.get_delta_weight(adapter)
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(
                        f"merge: adapter {adapter!r} gives a weight that is not finite"
                    )
                self._unmerged.append(base.weight)
                base.weight = QuantizedWeight(quantize_like(merged, held))
                self.merged_adapters.append(adapter)

        def unmerge(self) -> None:
            if self._unmerged:
                self.get_base_layer().weight = self._unmerged[0]
            self._unmerged.clear()
            self.merged_adapters.clear()

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            """What an adapter adds to the weight: (out_features, in_features), fp32."""
            down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return (up.float() @ down.float()) * self.scaling[adapter]

        def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            if kwargs.pop("adapter_names", None) is not None:
                raise ValueError("one batch cannot mix adapters on quantized layers")
            if self.disable_adapters and self.merged:
                self.unmerge()
            y = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters or self.merged:
                return y
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    down, up = self.lora_A[adapter], self.lora_B[adapter]
                    seen = self.lora_dropout[adapter](x.to(down.weight.dtype))
                    y = y + (up(down(seen)) * self.scaling[adapter]).to(y.dtype)
            return y

    return LoraQuantLinear
