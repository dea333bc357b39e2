"""Other libraries as variants, one small file each.

A peer is a module with
    MODULE      what must be installed, None for torch itself
    DEVICES     where it runs
    VARIANTS    variant name -> the ops it computes
    build(variant, problem) -> Variant; raises Unsupported with the reason
Its imports are made in `build`, so that a peer that is not installed costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from ..problem import Problem, Unsupported, Variant, choose

FILES = ("torch_sdpa", "flex_attention", "flash_attn", "xformers", "torch_dense", "torch_rounded",
         "torch_reference", "bitsandbytes", "torchao", "onnxruntime", "gptqmodel",
         "compressed_tensors", "torch_naive", "liger_kernel", "trl", "torch_adamw",
         "ours")  # fmt: skip
# Where the distribution is not named like the module.
_DISTRIBUTIONS = {"flash_attn": "flash-attn", "compressed_tensors": "compressed-tensors",
                  "liger_kernel": "liger-kernel"}  # fmt: skip


def modules() -> list[ModuleType]:
    return [import_module(f"{__name__}.{name}") for name in FILES]


def variants(op: str | None = None) -> dict[str, ModuleType]:
    """Every variant of every peer by name, or those that compute an op."""
    return {
        name: peer
        for peer in modules()
        for name, ops in peer.VARIANTS.items()
        if op is None or op in ops
    }


def find(name: str, op: str) -> ModuleType:
    """The peer of a variant.

    Raises:
        ValueError: no variant of this op has that name; offers the nearest.
    """
    known = variants(op)
    return known[choose(f"peer of {op}", name, list(known))]


def why_not(peer: ModuleType, device: str) -> str | None:
    """Why a peer cannot run here, in one sentence, or None."""
    if peer.MODULE is not None and find_spec(peer.MODULE) is None:
        return f"{peer.MODULE} is not installed"
    if device not in peer.DEVICES:
        return f"{peer.MODULE or 'torch'} runs it on {' and '.join(peer.DEVICES)} only"
    return None


def build(name: str, problem: Problem) -> Variant:
    """A peer's variant for a problem.

    Raises:
        Unsupported: not installed, or it cannot compute this problem; says why.
    """
    peer = find(name, problem.op)
    if (reason := why_not(peer, problem.device)) is not None:
        raise Unsupported(reason)
    return peer.build(name, problem)


def versions() -> dict[str, str | None]:
    """Version of each peer's package; None: not installed."""
    found = {}
    for peer in modules():
        if peer.MODULE is not None:
            name = _DISTRIBUTIONS.get(peer.MODULE, peer.MODULE)
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
    return found
