"""NKI: which `nki` the kernels are written against here, and how one is launched; knows no op.

Where the official package is installed, kernels import it; elsewhere they import our interpreter
(`genai_perf.neuron.interpreter`), which runs them only where GENAI_PERF_NKI=interpret asks for it:
exact and slow, a test of the kernels and not a way to use them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch

from .._config import CONFIG

_INTERPRETER = "genai_perf.neuron.interpreter"
_OFFICIAL = ("nki", "nki.language", "nki.isa")
DEVICES = ("neuron", "xla")


def interpreting() -> bool:
    return CONFIG.nki == "interpret"


@cache
def official() -> bool:
    """Whether the vendor's package is here; the index's empty placeholder of that name is not."""
    try:
        return find_spec("nki.isa") is not None and find_spec("nki.language") is not None
    except ModuleNotFoundError:
        return False


def simulating() -> bool:
    """Only the package, and no device: the vendor's simulator, where NKI_SIMULATOR asks for it."""
    return official() and CONFIG.nki_simulator and not interpreting()


@cache
def _interpreter() -> ModuleType:
    return import_module(_INTERPRETER)


@cache
def modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """nki, nki.language and nki.isa, as kernels import them."""
    if official() and not interpreting():
        return tuple(import_module(name) for name in _OFFICIAL)
    found = _interpreter().modules()
    return tuple(found[name] for name in _OFFICIAL)


def __getattr__(name: str):
    """`from ..._backends.nki import nki, nisa, nl` in the files that hold kernels."""
    if name in ("nki", "nl", "nisa"):
        return modules()[("nki", "nl", "nisa").index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def unavailable() -> str | None:
    if interpreting():
        missing = find_spec("ml_dtypes") is None
        return "the NKI interpreter needs ml_dtypes (pip install ml_dtypes)" if missing else None
    if not official():
        return "nki, the Neuron SDK's kernel package, is not installed"
    if not simulating() and find_spec("torch_neuronx") is None:
        return "nki needs torch-neuronx to reach a Neuron device, which is not installed"
    return None


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Why no NKI kernel can take these tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        kind = tensor.device.type
        on_cpu = kind == "cpu" and (interpreting() or simulating())
        if kind not in DEVICES and not on_cpu:
            return f"nki needs tensors on a Neuron device, got {tensor.device}"
    return unavailable()


def cores() -> int:
    """Physical cores of one launch: 2 where the runtime joins two into a logical one."""
    return CONFIG.neuron_logical_cores


def launch(kernel, *args, cores: int = 1):
    """Call `kernel` with torch tensors and constants; its outputs as torch tensors.

    On a Neuron device the tensors are handed over as they are; on the CPU they become NumPy arrays
    for the interpreter or the simulator, and come back.
    """
    kernel = kernel[cores] if cores > 1 else kernel
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(t.device.type in DEVICES for t in tensors):
        return kernel(*(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args))
    if simulating():
        kernel = modules()[0].simulate(kernel)
    outputs = kernel(*(to_numpy(a) if isinstance(a, torch.Tensor) else a for a in args))
    return to_torch(outputs) if isinstance(outputs, np.ndarray) else tuple(map(to_torch, outputs))


def _names() -> dict[torch.dtype, str]:
    # fp8 of the OCP kind travels as the IEEE-like one: up to 240 their bits are the same.
    return {torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "float8_e4m3",
            torch.float8_e5m2: "float8_e5m2"}  # fmt: skip


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """The same memory, in a NumPy type (ml_dtypes for bfloat16 and fp8)."""
    x = x.detach().contiguous()
    name = _names().get(x.dtype)
    if name is None:
        return x.numpy()
    bits = torch.int16 if x.dtype.itemsize == 2 else torch.uint8
    return x.view(bits).numpy().view(getattr(import_module("ml_dtypes"), name))


def to_torch(x: np.ndarray) -> torch.Tensor:
    """The same memory as a torch tensor."""
    for dtype, name in _names().items():
        if x.dtype.name == name:
            bits = np.int16 if x.itemsize == 2 else np.uint8
            return torch.from_numpy(x.view(bits)).view(dtype)
    return torch.from_numpy(x)


@contextmanager
def standing_in() -> Iterator[None]:
    """`with standing_in():` programs that import nki find the interpreter; for foreign kernels.

    Raises:
        RuntimeError: the official package is installed; it is never shadowed.
    """
    if official():
        raise RuntimeError("nki is installed: the interpreter does not stand in for it")
    found = _interpreter().modules()
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
