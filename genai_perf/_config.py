"""Every environment variable that genai_perf reads, read once, here.

GENAI_PERF_ISA      force the native kernels to scalar, avx2 or avx512 (the best by default)
GENAI_PERF_BACKEND  the backend that calls without backend= take, where it can run the call
TRITON_INTERPRET    Triton's own switch: its kernels run in its interpreter, on the CPU
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    isa: str | None
    backend: str | None
    triton_interpret: bool


CONFIG = Config(
    isa=os.environ.get("GENAI_PERF_ISA") or None,
    backend=os.environ.get("GENAI_PERF_BACKEND") or None,
    triton_interpret=os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes"),
)
