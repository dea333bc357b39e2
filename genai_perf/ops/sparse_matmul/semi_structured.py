"""2:4 tensor cores through torch.sparse's own semi-structured tensors, for many rows of x. Tested
against fakes; not run on a GPU.

torch keeps places in another order, so a weight is converted at its first call, and the result is
kept with its values: as many bytes again.
"""

import torch
import torch.nn.functional as F

from ...formats import SparseTensor

FEW_ROWS = 8  # reading W takes longer than multiplying it: Triton's kernel reads less
# Of W, for 16-bit values, in both of torch's libraries.
ROWS, COLUMNS = 32, 64
_KEPT = "_genai_perf_semi_structured"


def why_not(x, values, index, row_start, scale, bias, group_size, n) -> str | None:
    if x.device.type != "cuda" or torch.version.hip:
        return f"semi_structured needs tensors of an NVIDIA GPU, got {x.device}"
    if row_start is not None:
        return "semi_structured takes the 2:4 layout, got a bitmask"
    if values.dtype not in (torch.bfloat16, torch.float16) or values.dtype != x.dtype:
        return (f"semi_structured takes x and values both of bfloat16 or of float16, "
                f"got {x.dtype} and {values.dtype}")  # fmt: skip
    if bias is not None and bias.dtype != x.dtype:
        return f"semi_structured takes a bias of the dtype of x ({x.dtype}), got {bias.dtype}"
    k = x.shape[-1]
    if not n or not k or n % ROWS or k % COLUMNS:
        return f"semi_structured needs N a multiple of {ROWS} and K of {COLUMNS}, got {(n, k)}"
    if x.numel() // k <= FEW_ROWS:
        return f"semi_structured takes more than {FEW_ROWS} rows of x, got {x.numel() // k}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        return f"2:4 tensor cores need compute capability 8.0, got {major}.{minor}"
    return None


def forward(x, values, index, row_start, scale, bias, group_size, n):
    k = x.shape[-1]
    y = F.linear(x.reshape(-1, k), _converted(values, index, (n, k)), bias)
    return y.view(*x.shape[:-1], n)


def _converted(values: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """torch's form of the weight, made again where the values have changed since."""
    version = 0 if values.is_inference() else values._version
    made_at, kept = getattr(values, _KEPT, (None, None))
    if made_at != version:
        dense = SparseTensor("2:4", torch.Size(shape), values.dtype, values, index).to_dense()
        kept = torch.sparse.to_sparse_semi_structured(dense)
        setattr(values, _KEPT, (version, kept))
    return kept
