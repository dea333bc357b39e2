"""An interpreter of NKI kernels on the CPU: NumPy computes, the hardware's rules are enforced.

It runs the portable subset of NKI 0.3 to 0.7 for gen2 (trn1, best effort), gen3 (trn2) and gen4
(trn3), one instruction after the other. A kernel that the hardware would not run is refused with
its line; a kernel that runs is metered (instructions, bytes, estimated cycles by engine).

    with target("gen4"):
        run = simulate(kernel).run(numpy_array)
    print(run.report)

Kernels find it as `nki` through `genai_perf._backends.nki` only.
"""

from functools import cache
from types import ModuleType

from . import isa, language
from .dtypes import DType
from .errors import KernelError
from .launch import Kernel, Run, current_target, jit, simulate, target
from .report import EngineUse, Report
from .targets import TARGETS, Target
from .tensor import Tensor

__all__ = [
    "DType", "EngineUse", "Kernel", "KernelError", "Report", "Run", "TARGETS", "Target", "Tensor",
    "current_target", "jit", "modules", "simulate", "target",
]  # fmt: skip


@cache
def modules() -> dict[str, ModuleType]:
    """`nki`, `nki.language`, `nki.isa` and `nki.isa.constants` as kernels import them."""
    nki, found = ModuleType("nki", __doc__), {"nki.language": language.module(), **isa.modules()}
    vars(nki).update(jit=jit, simulate=simulate, dtype=DType, language=found["nki.language"],
                     isa=found["nki.isa"])  # fmt: skip
    typing = ModuleType("nki.typing")
    vars(typing).update(tensor=Tensor)
    return {"nki": nki, "nki.typing": typing, **found}
