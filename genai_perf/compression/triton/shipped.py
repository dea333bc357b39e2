"""The block kernel as it ships: n:m, and weights that are chosen before."""

from collections.abc import Iterator

from ..._backends.triton_aot import Source
from .kernel import CONFIG, _sparsegpt_block_kernel


def sources(arch: str, *, subset: bool = False) -> Iterator[Source]:
    """The same for every `arch`, and all of it in the subset."""
    sizes = {name: CONFIG[name] for name in ("BLOCK_C", "BLOCK_R")}
    options = {name: CONFIG[name] for name in ("num_warps", "num_stages")}
    for label, grouped in (("n:m", True), ("unstructured", False)):
        yield Source(f"sparsegpt block {label}", _sparsegpt_block_kernel,
                     {"GROUPED": grouped, **sizes}, "fp32", {"pruned_ptr": "u8"}, (), options,
                     "none")  # fmt: skip
