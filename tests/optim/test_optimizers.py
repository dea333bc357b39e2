"""AdamW8bit and Lion8bit as a training script uses them."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from genai_perf.models import stdlib_text, tiny_python_lm
from genai_perf.optim import AdamW8bit, Lion8bit

OURS = pytest.mark.parametrize("kind", [AdamW8bit, Lion8bit])


def small(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator).to(dtype)
        (model(x) - x.flip(-1)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@OURS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_round_trip_goes_on_bit_for_bit(kind, dtype, tmp_path):
    model = small(dtype=dtype)
    optimizer = kind(model.parameters(), lr=1e-3)
    train(model, optimizer, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at")
    train(model, optimizer, 5, seed=2)
    saved, again = torch.load(tmp_path / "at"), small(seed=9, dtype=dtype)
    again.load_state_dict(saved["model"])
    other = kind(again.parameters(), lr=0.5)
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == 1e-3
    train(again, other, 5, seed=2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(optimizer.state[a][n], other.state[b][n]) for n in other.state[b])


def test_state_takes_two_bytes_and_small_parameters_keep_fp32():
    model = small()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, 1)
    weight, bias = optimizer.state[model[0].weight], optimizer.state[model[0].bias]
    held = sum(x.nbytes for name, x in weight.items() if name != "step")
    assert held == 2 * model[0].weight.numel() * (1 + 4 / 256)
    assert bias["exp_avg"].dtype == torch.float32 and "exp_avg_scale" not in bias


def test_goes_on_from_torch_adamw():
    model = small()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, theirs, 20)
    twin = copy.deepcopy(model)
    ours = AdamW8bit(twin.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-3
    assert ours.state[twin[0].weight]["step"] == 20
    before = [p.detach().clone() for p in model.parameters()]
    train(model, theirs, 5, seed=3)
    train(twin, ours, 5, seed=3)
    for a, b, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert (a - b).norm() < 0.1 * (a - old).norm()


def test_groups_closures_and_schedules():
    model = small()
    groups = [{"params": [model[0].weight], "weight_decay": 0.5}, {"params": [model[2].weight]}]
    optimizer = AdamW8bit(groups, lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 64)).square().mean()
        loss.backward()
        return loss

    assert math.isfinite(optimizer.step(closure).item())
    assert torch.equal(model[0].weight, before[0])  # lr 0
    scheduler.step()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[0].bias, before[1])  # in no group


def test_two_ranks_of_fsdp_train_as_one(tmp_path):
    """Both take the same batch: their mean gradient is that of one; shards end where blocks do."""
    command = [sys.executable, Path(__file__).with_name("sharded_rank.py")]
    ranks = [subprocess.Popen([*command, str(rank), tmp_path]) for rank in range(2)]
    model = small()
    train(model, AdamW8bit(model.parameters(), lr=1e-2), 5)
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for rank in range(2):
        held, full = torch.load(tmp_path / f"{rank}.pt")
        assert held == [p.numel() // 2 for p in model.parameters()]
        for a, b in zip(full, model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_follows_fp32_adamw_on_the_embedded_model():
    """200 steps on the same batches: the same loss, and every parameter near where fp32 AdamW takes
    it, against the distance that it went."""
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    start, theirs, ours = (load(tiny_python_lm(), dtype=torch.float32) for _ in range(3))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_python_lm())
    text = "".join(source for _, source in stdlib_text("heldout")[:6])
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 200 * 128].view(200, 2, 64)
    optimizers = [torch.optim.AdamW(theirs.parameters(), 3e-4), AdamW8bit(ours.parameters(), 3e-4)]
    losses = []
    for batch in ids:
        row = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            row.append(loss.item())
        losses.append(row)
    fp32, eight = torch.tensor(losses)[100:].mean(0).tolist()
    assert abs(eight - fp32) < 0.003 * fp32
    parameters = zip(start.named_parameters(), theirs.parameters(), ours.parameters(), strict=True)
    for (name, old), a, b in parameters:
        assert (a - b).norm() < 0.1 * (a - old).norm(), name  # at most 0.063 was seen


@pytest.mark.parametrize("option, value", [
    ("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", -1e-8), ("weight_decay", -0.1),
    ("block_size", 100), ("min_8bit_size", -1)])  # fmt: skip
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"AdamW8bit: {option} must be"):
        AdamW8bit(small().parameters(), **{option: value})


def test_a_bad_gradient_names_its_parameter_and_may_be_mended():
    model = small()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, 1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[2].weight.grad[3, 4] = math.nan
    before = model[2].weight.detach().clone()
    said = r"AdamW8bit: parameter 2 of shape \(64, 128\): adamw_step: grad must be finite.*\(3, 4\)"
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert optimizer.state[model[2].weight]["step"] == 1
    model[2].weight.grad[3, 4] = 0
    optimizer.step()


def test_states_that_do_not_fit_are_refused():
    model = small()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    other = AdamW8bit(small().parameters(), block_size=64)
    with pytest.raises(ValueError, match="state of parameter 0: exp_avg must be uint8 with 128 sc"):
        other.load_state_dict(saved)
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:5]
    with pytest.raises(ValueError, match=r"exp_avg must have shape \(128, 64\), got \(5, 64\)"):
        AdamW8bit(small().parameters()).load_state_dict(saved)
