"""Running the kernel: its output, grid and configuration. Nothing here waits for the device."""

import math

import torch

from ...._backends import triton as toolchain
from ...quant_matmul.triton.launch import Weight
from .kernel import _dequantize_kernel

# Not measured: 16 elements a thread, which the ahead-of-time gate finds without spills.
CONFIG = {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1}
INTERPRETER = {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 1, "num_stages": 1}


def dequantize(weight, format, group_size, shape, dtype) -> torch.Tensor:
    device = weight[0].device
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    k = out.shape[-1]
    n = math.prod(out.shape[:-1])
    packed = Weight(format, n, k, weight, group_size)
    config = INTERPRETER if toolchain.arch(device) == "interpreter" else CONFIG
    toolchain.launch(
        _dequantize_kernel, -(-n // config["BLOCK_N"]) * -(-k // config["BLOCK_K"]), device,
        *packed.pointers, out, n, k, *packed.numbers, **packed.layout(config["BLOCK_K"]),
        # A product and a sum in one rounding would not give the bits of the other backends.
        enable_fp_fusion=False, **config,
    )  # fmt: skip
    return out
