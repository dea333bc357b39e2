"""gp.sparse_matmul: its checks, its two ops (forward, gradient for x) and their autograd."""

import torch

from ..._checks import check_dtype, check_ndim, check_same, check_tensor, fail
from ..._dispatch import Op
from ...formats import SparseTensor
from ...formats.base import FLOATS
from ..linear import fake_product

_WEIGHT = "Tensor values, Tensor index, Tensor? row_start, Tensor? scale"

SPARSE_MATMUL = Op(
    __package__,
    "sparse_matmul",
    f"(Tensor x, {_WEIGHT}, Tensor? bias, int group_size, SymInt n, *, str? backend=None) "
    "-> Tensor",
    fake=fake_product,
    backends=("semi_structured", "triton", "native", "reference"),
)
SPARSE_MATMUL_BACKWARD = Op(
    __package__,
    "sparse_matmul_backward",
    f"(Tensor dy, {_WEIGHT}, int group_size, SymInt k, *, str? backend=None) -> Tensor",
    fake=fake_product,
    backends=("triton", "native", "reference"),
    entry="backward",
)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, *weight, bias, ctx.group_size, _ = inputs
    ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.backend = keyword_only_inputs["backend"]
    ctx.save_for_backward(*weight)


def _backward(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        backend = None if ctx.backend == "semi_structured" else ctx.backend
        dx = SPARSE_MATMUL_BACKWARD(dy, *ctx.saved_tensors, ctx.group_size, ctx.k, backend=backend)
    if ctx.needs_input_grad[5]:
        dbias = dy.reshape(-1, dy.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None, None


SPARSE_MATMUL.register_autograd(_backward, setup_context=_setup_context, of_reference=True)


def sparse_matmul(x: torch.Tensor, weight: SparseTensor, bias: torch.Tensor | None = None,
                  *, backend: str | None = None) -> torch.Tensor:  # fmt: skip
    """x @ W^T + bias from the stored values of a sparse W alone.

    y[..., n] = sum_k x[..., k] * W[n, k] + bias[n], products and sums in fp32, rounded once.
    The weight gets no gradient (`nn.SparseLinear` trains one); x and bias do.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        weight: W of shape (N, K), from `formats.sparse24.pack` or `formats.sparse.pack`.
        bias: (N), fp32, bf16 or fp16, or None.
        backend: "semi_structured", "triton", "native" or "reference"; None takes the first that
            can run the call.

    Returns:
        (..., N), of the dtype of x. Up to 8 rows, the same bits for any number of threads and of
        rows.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendUnsupported: the named backend cannot run this call.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 2 (2:4 storage).
    """
    op = "sparse_matmul"
    if not isinstance(weight, SparseTensor):
        raise TypeError(f"{op}: weight must be a SparseTensor, got {type(weight).__name__}")
    check_tensor(op, x=x)
    check_dtype(op, FLOATS, x=x)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        fail(op, "x", f"(..., {k}) for a weight of shape {(n, k)}", f"shape {tuple(x.shape)}")
    check_same(op, "device", x=x, weight=weight)
    if bias is not None:
        check_tensor(op, bias=bias)
        check_dtype(op, FLOATS, bias=bias)
        check_ndim(op, 1, f"({n},)", bias=bias)
        if bias.shape[0] != n:
            fail(op, "bias", f"of shape ({n},)", f"shape {tuple(bias.shape)}")
        check_same(op, "device", x=x, bias=bias)
    return SPARSE_MATMUL(x, weight.values, weight.index, weight.row_start, weight.scale, bias,
                         weight.group_size, n, backend=backend)  # fmt: skip
