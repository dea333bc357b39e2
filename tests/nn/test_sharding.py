"""Quantized layers under FSDP2: two gloo ranks compute what one process computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from genai_perf.nn import QuantConfig, QuantizedWeight, quantize_model, shardable

CONFIGS = {
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "int4": QuantConfig("int4", group_size=32, symmetric=False, scale_dtype=torch.bfloat16),
    "int8": QuantConfig("int8"),
    "fp8": QuantConfig("fp8"),
}


class Block(nn.Module):
    """A frozen linear layer, and a small trained one beside it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64).requires_grad_(False)
        self.adapter = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return x + self.linear(x).relu() + self.adapter(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_two_ranks_compute_as_one(tmp_path):
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x.pt")
    script = str(Path(__file__).parent / "sharded_rank.py")
    ranks = [subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)])
             for rank in range(2)]  # fmt: skip
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, config in CONFIGS.items():
        model = quantize_model(Net(), config, skip=("adapter",))
        weights = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
        steps = [step(model, part) for part in x]
        for rank in range(2):
            torch.testing.assert_close(found[rank][name]["y"], steps[rank][0])
        grads = found[0][name]["grads"]
        assert grads.keys() == steps[0][1].keys() and len(grads) == 2
        y, mean = step(model, x.reshape(12, 64))
        for key, grad in mean.items():
            torch.testing.assert_close(grads[key], grad)
        # Each rank holds half: components whose rows two divides.
        stored = sum(t.nbytes for w in weights for t in w.tensor().components().values() if t.dim())
        assert found[0][name]["nbytes"] + found[1][name]["nbytes"] == stored
        assert found[0][name]["nbytes"] == pytest.approx(stored / 2, rel=0.03)
        for key in found[0][name]["shards"]:
            parts = [rank[name]["shards"][key].view(torch.uint8) for rank in found]
            want = getattr(weights[0].tensor(), key).view(torch.uint8)
            assert torch.equal(torch.cat(parts), want), key


def test_state_and_moves_stay_what_they_are():
    model = quantize_model(Net(), "int4", skip=("adapter",))
    state, x = model.state_dict(), torch.randn(3, 64)
    want = model(x)
    shardable(model)
    assert model.state_dict().keys() == state.keys()
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, QuantizedWeight)
                   for p in m.parameters())  # fmt: skip
    assert torch.equal(model(x), want)
    half = model.to(torch.bfloat16)
    assert half.blocks[0].linear.weight.scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    other = shardable(quantize_model(Net(), "int4", skip=("adapter",)))
    nn.init.zeros_(other.blocks[0].adapter.weight)
    other.load_state_dict(state)
    assert torch.equal(other(x), want)


def test_bad_input():
    with pytest.raises(ValueError, match="shardable: model must be one with quantized layers"):
        shardable(nn.Linear(4, 4))
