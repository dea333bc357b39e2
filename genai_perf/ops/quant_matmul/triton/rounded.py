"""Running products of rounded rows of x with int8 and fp8 weights; nothing waits for the device."""

import torch

from ...._backends import triton as toolchain
from ....formats import Spec, get
from ...quantize.triton.encode import encode_rows
from ..components import check_components, scale_places
from ..rounding import GROUP, in_groups
from . import configs
from .rounded_kernels import FP8, FP8_AS_HALF, INT8, _rounded_gemm_kernel


def kind(format: str, arch: str) -> int:
    """The kernel's KIND for weights of `format`."""
    if format == "int8":
        return INT8.value
    own = arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 89
    return (FP8 if own else FP8_AS_HALF).value


def product(x, qdata, scale, bias, format: str, group_size: int) -> torch.Tensor:
    n, k = qdata.shape[0], x.shape[-1]
    check_components(format, n, k, (qdata, scale, None, None, None), group_size)
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y
    if k == 0:  # an empty sum
        return y.zero_() if bias is None else y.copy_(bias)
    groups = in_groups(group_size)
    m, codec = y.numel() // n, get(format)
    layout = codec.layout((m, k), Spec(-GROUP if groups else -1))
    codes, x_scale = (x.new_empty(shape, dtype=dtype) for shape, dtype in layout.values())
    encode_rows(x.contiguous(), format, k, GROUP if groups else k, codes, x_scale, mark=True)
    if format != "int8":
        codes, qdata = codes.view(torch.uint8), qdata.view(torch.uint8)
    scale, bias = scale.float().contiguous(), None if bias is None else bias.contiguous()
    taken = kind(format, toolchain.arch(x.device))
    own = taken != FP8_AS_HALF.value
    config = configs.choose_rounded(x.device, format, m, n, k, own=own, groups=groups)
    rows, stride, _ = scale_places(format, n, k, group_size)
    toolchain.launch(
        _rounded_gemm_kernel, -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"]), x.device,
        codes, x_scale, qdata.contiguous(), scale, bias, y, k, m, n, k, rows, stride,
        x_scale.shape[-1], KIND=taken, GROUPS=groups,
        WHOLE=k % config["BLOCK_K"] == 0, BIAS=bias is not None,
        # A product and a sum in one rounding would not give the bits of the other backends.
        enable_fp_fusion=False, **config,
    )  # fmt: skip
    return y
