"""SparseLinear: same result as the layer with zeros, and a mask that no optimizer can break."""

import copy

import pytest
import torch
from torch import nn

from genai_perf.formats import sparse24
from genai_perf.nn import SparseLinear


def pruned(layout, bias=True, n=24, k=44):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        if layout == "2:4":
            groups = linear.weight.view(n, k // 4, 4)
            groups *= groups.abs().argsort(2).argsort(2) >= 2
            groups[0, 0] = 0  # a group with fewer than 2 weights
        else:
            linear.weight *= torch.rand(n, k) < 0.5
    return linear


@pytest.mark.parametrize("layout", ["2:4", "bitmask"])
@pytest.mark.parametrize("rows", [3, 20])
def test_output_and_gradients_are_those_of_the_dense_layer(layout, rows):
    linear = pruned(layout)
    layer = SparseLinear.from_float(copy.deepcopy(linear))
    assert layer.layout == layout
    xs = [torch.randn(2, rows, 44, generator=torch.Generator().manual_seed(1)).requires_grad_()
          for _ in range(2)]  # fmt: skip
    outputs = [module(x) for module, x in zip((linear, layer), xs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(linear.bias.grad, layer.bias.grad, rtol=1e-4, atol=1e-4)
    kept = linear.weight != 0
    want = linear.weight.grad[kept]
    grads = copy.copy(layer.tensor())
    grads.values = layer.values.grad
    torch.testing.assert_close(grads.to_dense()[kept], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.to_linear()(xs[0]), outputs[0])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("layout", ["2:4", "bitmask"])
def test_the_mask_stays_under_any_optimizer(layout, optimizer):
    linear = pruned(layout)
    zero = linear.weight == 0
    layer = SparseLinear.from_float(linear)
    before = layer.tensor().to_dense().detach().clone()
    stepper, goal = optimizer(layer.parameters()), torch.randn(24, 44)
    x = torch.randn(64, 44)
    losses = []
    for _ in range(10):
        loss = (layer(x) - x @ goal.T).square().mean()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    after = layer.tensor().to_dense()
    assert not after[zero].any() and not torch.equal(before, after)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layout", ["2:4", "bitmask"])
def test_state_dict_dtype_and_copies(layout):
    layer, x = SparseLinear.from_float(pruned(layout)), torch.randn(4, 44)
    other = SparseLinear.from_float(pruned(layout))
    with torch.no_grad():
        other.values.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16 == half.tensor().dtype
    damaged = layer.state_dict()
    damaged["index"] = torch.full_like(damaged["index"], 255)
    with pytest.raises(RuntimeError, match="sparse tensor: "):
        other.load_state_dict(damaged)


def test_codes_keep_their_scale_and_do_not_train():
    from genai_perf import formats

    weight = pruned("2:4").weight.detach()
    for name in ("int8", "int4"):
        layer = SparseLinear(sparse24.pack(formats.get(name).quantize(weight)))
        scale, x = layer.scale.clone(), torch.randn(3, 44, requires_grad=True)
        y = layer.to(torch.bfloat16)(x)
        assert torch.equal(layer.scale, scale) and not layer.values.requires_grad
        torch.testing.assert_close(y, x @ layer.tensor().to_dense(torch.float32).T)
        y.sum().backward()
        assert x.grad is not None


def test_what_is_refused():
    with pytest.raises(ValueError, match="an nn.Linear or a Conv1D, got Embedding"):
        SparseLinear.from_float(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="zero in 2 of every 4 columns"):
        SparseLinear.from_float(nn.Linear(8, 4), "2:4")
    with pytest.raises(ValueError, match="layout must be one of"):
        SparseLinear.from_float(nn.Linear(8, 4), "4:2")
    with pytest.raises(ValueError, match=r"bias must be of shape \(24,\)"):
        SparseLinear(sparse24.pack(pruned("2:4").weight.detach()), torch.ones(3))
