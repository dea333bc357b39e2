"""What a step accepts, and how it refuses."""

import torch

from ..._checks import check_choice, check_dtype, check_same, check_tensor, fail
from ...formats.base import FLOATS, ceil_div
from ...formats.code_book import BLOCK_SIZES


def check_step(op, p, grad, block_size, **moments) -> None:
    """Raises ValueError unless all tensors fit together; `moments` are pairs (moment, scale)."""
    given = {"p": p, "grad": grad} | {name: moment for name, (moment, _) in moments.items()}
    scales = {f"{name}_scale": s for name, (_, s) in moments.items() if s is not None}
    check_tensor(op, **given, **scales)
    check_dtype(op, FLOATS, p=p, grad=grad)
    check_choice(op, "block_size", block_size, BLOCK_SIZES)
    check_same(op, "device", **given, **scales)
    for name, tensor in given.items():
        if tensor.shape != p.shape:
            fail(op, name, f"of p's shape {tuple(p.shape)}", f"shape {tuple(tensor.shape)}")
        if name != "grad" and not tensor.is_contiguous():
            fail(op, name, "contiguous", f"strides {tensor.stride()}")
    for name, (moment, scale) in moments.items():
        check_dtype(op, (torch.float32 if scale is None else torch.uint8,), **{name: moment})
    blocks = ceil_div(p.numel(), block_size)
    for name, scale in scales.items():
        check_dtype(op, (torch.float32,), **{name: scale})
        if scale.shape != (blocks,):
            fail(op, name, f"of shape ({blocks},)", f"shape {tuple(scale.shape)}")


def refuse_gradient(op: str, grad: torch.Tensor) -> None:
    bad = ~(grad.float() ** 2).isfinite() if op == "adamw" else ~grad.isfinite()
    at = tuple(int(i) for i in bad.nonzero()[0])
    what = "finite, its square too," if op == "adamw" else "finite"
    fail(f"{op}_step", "grad", what, f"{grad[at].item()} at {at}; nothing was changed")
