"""AWS Neuron: the NKI interpreter, host detection, metrics, export for serving."""

from .export import (
    export_optimum,
    llama_for_sampling,
    modelopt_config,
    modelopt_state_dict,
    nxdi_config,
    nxdi_state_dict,
    quantize_static,
)
from .host import Topology, is_available, topology

__all__ = [
    "Topology",
    "export_optimum",
    "is_available",
    "llama_for_sampling",
    "modelopt_config",
    "modelopt_state_dict",
    "nxdi_config",
    "nxdi_state_dict",
    "quantize_static",
    "topology",
]
