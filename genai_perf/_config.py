"""Every environment variable that genai_perf reads, read once, here.

GENAI_PERF_ISA      force the native kernels to scalar, avx2 or avx512 (the best by default)
GENAI_PERF_BACKEND  the backend that calls without backend= take, where it can run the call
TRITON_INTERPRET    Triton's own switch: its kernels run in its interpreter, on the CPU
GENAI_PERF_NKI      interpret: backend="nki" runs CPU tensors in our interpreter of NKI kernels
NKI_SIMULATOR       the Neuron SDK's switch: its kernels run in its simulator, on the CPU
NEURON_LOGICAL_NC_CONFIG  the Neuron runtime's: physical cores of a logical one, 1 or 2
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    isa: str | None
    backend: str | None
    triton_interpret: bool
    nki: str | None
    nki_simulator: bool
    neuron_logical_cores: int


def _switch(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "on", "yes")


CONFIG = Config(
    isa=os.environ.get("GENAI_PERF_ISA") or None,
    backend=os.environ.get("GENAI_PERF_BACKEND") or None,
    triton_interpret=_switch("TRITON_INTERPRET"),
    nki=os.environ.get("GENAI_PERF_NKI") or None,
    nki_simulator=_switch("NKI_SIMULATOR"),
    neuron_logical_cores=2 if os.environ.get("NEURON_LOGICAL_NC_CONFIG") == "2" else 1,
)
