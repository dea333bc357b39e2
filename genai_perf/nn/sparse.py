"""SparseLinear: nn.Linear that computes from, and trains, the kept values of a sparse weight."""

from dataclasses import replace

import torch
from torch import nn

from .._checks import check_choice, fail
from .._errors import CheckpointError
from ..formats import SparseTensor, sparse, sparse24
from ..formats.sparse_tensor import LAYOUTS, row_starts
from ..ops.sparse_matmul import SPARSE_MATMUL_BACKWARD, sparse_matmul
from .linear import dense_weight


def pack(weight: torch.Tensor, layout: str | None = None) -> SparseTensor:
    """A pruned (N, K) weight in `layout`, or in "2:4" where it fits, else as "bitmask"."""
    check_choice("SparseLinear", "layout", layout, (None, *LAYOUTS))
    if layout is None:
        fits = torch.nn.functional.pad(weight != 0, (0, -weight.shape[1] % 4))
        layout = "2:4" if (fits.unflatten(1, (-1, 4)).sum(2) <= 2).all() else "bitmask"
    return (sparse24 if layout == "2:4" else sparse).pack(weight)


class _Product(torch.autograd.Function):
    """sparse_matmul with a gradient for the kept values too."""

    @staticmethod
    def forward(ctx, x, values, bias, weight: SparseTensor, backend):
        ctx.save_for_backward(x, values)
        ctx.weight, ctx.backend = weight, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return sparse_matmul(x, replace(weight, values=values), bias, backend=backend)

    @staticmethod
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        weight = replace(ctx.weight, values=values)
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = SPARSE_MATMUL_BACKWARD(dy, weight.values, weight.index, weight.row_start,
                                        weight.scale, weight.group_size, weight.shape[1],
                                        backend=ctx.backend)  # fmt: skip
        rows = dy.reshape(-1, dy.shape[-1]).float()
        if ctx.needs_input_grad[1]:
            dense = rows.T @ x.reshape(-1, x.shape[-1]).float()
            codec = sparse24 if weight.layout == "2:4" else sparse
            dvalues = codec.take(weight, dense).to(values.dtype)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        return dx, dvalues, dbias, None, None


class SparseLinear(nn.Module):
    """y = x @ W^T + bias with W kept sparse, in the place of nn.Linear.

    The kept values are the parameter `values`, and pruned weights are no parameter at all: whatever
    the optimizer does, the mask stays. (Zeros that fill up a 2:4 group stay zero: they get no
    gradient and no value.) Codes of int8 and int4 are not trained.

    state_dict: `values`, `index`, `scale` where there are codes, and `bias`.

    Args:
        weight: (N, K), from `formats.sparse24.pack` or `formats.sparse.pack`.
        bias: (N) or None; a Parameter is kept as it is.
        backend: of `sparse_matmul`; None: the best that runs.
    """

    def __init__(self, weight: SparseTensor, bias: torch.Tensor | None = None, *,
                 backend: str | None = None):  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            fail("SparseLinear", "bias", f"of shape {(self.out_features,)}",
                 f"shape {tuple(bias.shape)}")  # fmt: skip
        self.layout, self.group_size, self.backend = weight.layout, weight.group_size, backend
        self.dtype = weight.dtype
        trains = weight.values.is_floating_point()
        self.values = nn.Parameter(weight.values, requires_grad=trains)
        self.register_buffer("index", weight.index)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("row_start", weight.row_start, persistent=False)
        # Slots of 2:4 groups that hold no weight.
        spare = weight.values == 0 if trains and weight.layout == "2:4" else None
        has_spare = spare is not None and bool(spare.any())
        self.register_buffer("spare", spare if has_spare else None, persistent=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_float(cls, linear: nn.Module, layout: str | None = None) -> "SparseLinear":
        """A sparse copy of a pruned nn.Linear, or of transformers' Conv1D.

        Args:
            linear: the layer; it is left as it is, and its bias is shared.
            layout: "2:4" or "bitmask"; None: 2:4 where the weight fits it.

        Raises:
            ValueError: another kind of layer, a weight that does not fit, NaN.
        """
        weight = dense_weight(linear)
        if weight is None:
            fail("SparseLinear", "linear", "an nn.Linear or a Conv1D", type(linear).__name__)
        return cls(pack(weight, layout), linear.bias)

    def tensor(self) -> SparseTensor:
        """The weight; its components are the module's own tensors."""
        values = self.values if self.spare is None else self.values.masked_fill(self.spare, 0)
        return SparseTensor(self.layout, torch.Size((self.out_features, self.in_features)),
                            self.dtype, values, self.index, self.scale, self.group_size,
                            self.row_start)  # fmt: skip

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the same weight, zeros and all."""
        dense = self.tensor().to_dense().detach()
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None,
                           dtype=dense.dtype, device=dense.device)  # fmt: skip
        linear.weight = nn.Parameter(dense)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.tensor()
        if weight.values.requires_grad and torch.is_grad_enabled():
            frozen = replace(weight, values=weight.values.detach())
            return _Product.apply(x, weight.values, self.bias, frozen, self.backend)
        return sparse_matmul(x, weight, self.bias, backend=self.backend)

    def _apply(self, fn, recurse=True):
        scale, start = self.scale, self.row_start
        super()._apply(fn, recurse)
        # Neither a dtype nor a device makes a scale coarser.
        self.scale = None if scale is None else scale.to(self.scale.device)
        self.row_start = None if start is None else start.to(self.row_start.device)
        if self.values.is_floating_point():
            self.dtype = self.values.dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.layout == "bitmask":
            self.row_start = row_starts(self.index, self.values.dtype == torch.uint8)
        try:
            self.tensor().check(prefix)
        except CheckpointError as error:
            rest[-1].append(str(error))

    def extra_repr(self) -> str:
        weight = self.tensor()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layout={self.layout!r}, {weight.nbytes} bytes"
        )
