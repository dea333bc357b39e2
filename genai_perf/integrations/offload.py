"""Blocks larger than what an accelerator has free, run there one layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def free_memory(device: torch.device) -> int | None:
    """Bytes that an accelerator has free; None for a CPU, and for one that does not say."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else None


@contextmanager
def one_layer_at_a_time(block: nn.Module, device: torch.device) -> Iterator[None]:
    """While the `with` lasts, a submodule's weights are copied to `device` when it is called and
    dropped there when it returns, by accelerate's hooks; afterwards they are where they were.

    A module that reads the weights of another without calling it is not known to the hooks, and
    raises.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(block, execution_device=device)
    try:
        yield
    finally:
        remove_hook_from_module(block, recurse=True)
