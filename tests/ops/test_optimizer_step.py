"""optimizer_step: the kernels give the reference's bits, and what torch and float64 give."""

import math

import pytest
import torch
from torch import library

from genai_perf.formats.dynamic_map import dynamic_map, encode_blocks
from genai_perf.ops.optimizer_step import adamw_step, cases, lion_step
from genai_perf.ops.optimizer_step.reference import read

pytest.importorskip("genai_perf._C", reason="the native extension is not built")
SMALL = [case for case in cases.CASES if {"smoke", "edge"} & set(case.tags)]
OPTIONS = {"adamw": {"step": 3, "lr": 0.01, "weight_decay": 0.1}, "lion": {"lr": 0.01}}


def run(case, inputs, backend):
    options = OPTIONS[case.kind] | {"block_size": case.block_size or 256, "backend": backend}
    tensors = {name: None if x is None else x.clone() for name, x in inputs.items()}
    (adamw_step if case.kind == "adamw" else lion_step)(**tensors, **options)
    return {name: x for name, x in tensors.items() if x is not None}


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_native_gives_the_bits_of_the_reference(isa, case):
    inputs = cases.make_inputs(case)
    want, got = run(case, inputs, "reference"), run(case, inputs, "native")
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert not case.shape[0] or not torch.equal(got["p"], inputs["p"])


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_one_step_against_float64(case):
    inputs = cases.make_inputs(case)
    got = run(case, inputs, None)
    p, g = inputs["p"].double().reshape(-1), inputs["grad"].double().reshape(-1)
    block = case.block_size or 256
    m = read(inputs["exp_avg"], inputs["exp_avg_scale"], block, True).double()
    if case.kind == "adamw":
        v = read(inputs["exp_avg_sq"], inputs["exp_avg_sq_scale"], block, False).double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        change = 0.01 / (1 - 0.9**3) * m / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
        want = p * (1 - 0.01 * 0.1) - change
    else:
        change = 0.01 * (0.9 * m + 0.1 * g).sign()
        want = p - change
        m = 0.99 * m + 0.01 * g
    info = torch.finfo(case.dtype)
    allowed = info.eps / 2 * want.abs() + 1e-6 * (p.abs() + change.abs()) + info.smallest_normal
    assert ((got["p"].double().reshape(-1) - want).abs() <= allowed).all()
    back = read(got["exp_avg"], got.get("exp_avg_scale"), block, True).double()
    if case.block_size is None:
        torch.testing.assert_close(back, m, rtol=1e-6, atol=1e-12)
    elif p.numel():
        codes, absmax = encode_blocks(m.float(), block)
        near = (
            dynamic_map().double()[codes.long()]
            * absmax.double().repeat_interleave(block)[: m.numel()]
        )
        assert ((back - m).abs() <= (near - m).abs() * (1 + 1e-5) + 1e-6 * m.abs()).all()


def test_fp32_moments_follow_torch():
    p = torch.randn(50, 7)
    ours, theirs = p.clone(), p.clone().requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    moments = [torch.zeros_like(p), torch.zeros_like(p)]
    for step in range(1, 30):
        theirs.grad = torch.randn(50, 7)
        adamw.step()
        adamw_step(ours, theirs.grad, *moments, step=step, lr=0.01, weight_decay=0.1)
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-5, atol=2e-6)


def test_a_small_second_moment_never_becomes_zero():
    """Rounded to 0 it would leave eps alone to divide by, and its element would leap."""
    g = torch.full((256,), 1e-5)
    g[0] = 1.0
    for backend in ("native", "reference"):
        p, m = torch.zeros(256), torch.zeros(256, dtype=torch.uint8)
        v, m_scale, v_scale = m.clone(), torch.zeros(1), torch.zeros(1)
        m.fill_(127)
        for step in range(1, 20):
            adamw_step(p, g if step == 1 else g * 0, m, v, m_scale, v_scale, step=step, lr=1e-3,
                       weight_decay=0.0, backend=backend)  # fmt: skip
            assert (v[1:] > 0).all()
        assert p.abs().max() < 0.05


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
def test_a_gradient_that_is_not_finite_changes_nothing(backend, bad):
    case = cases.Case("", "adamw", (40, 100))
    inputs = cases.make_inputs(case)
    inputs["grad"][30, 5] = bad
    tensors = {name: x.clone() for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"grad must be finite, its square too,.* at \(30, 5\)"):
        adamw_step(**tensors, step=1, lr=0.1, backend=backend)
    for name, x in tensors.items():
        assert name == "grad" or torch.equal(x, inputs[name]), name


def test_refusals():
    p, codes, scale = torch.zeros(4, 100), torch.zeros(4, 100, dtype=torch.uint8), torch.zeros(2)
    step = {"step": 1, "lr": 0.1}
    with pytest.raises(ValueError, match="grad must be of p's shape"):
        adamw_step(p, p[:3], codes, codes, scale, scale, **step)
    with pytest.raises(ValueError, match=r"exp_avg_scale must be of shape \(2,\)"):
        adamw_step(p, p, codes, codes, scale[:1], scale, **step)
    with pytest.raises(ValueError, match="exp_avg must be.*uint8"):
        adamw_step(p, p, p, codes, scale, scale, **step)
    with pytest.raises(ValueError, match="p must be contiguous"):
        lion_step(p.t(), p.t(), codes.t().contiguous(), scale, lr=0.1)
    with pytest.raises(ValueError, match="block_size must be one of"):
        lion_step(p, p, codes, scale, lr=0.1, block_size=100)


def test_opcheck():
    inputs = cases.make_inputs(cases.Case("", "adamw", (3, 100)))
    ops = torch.ops.genai_perf
    order = ("p", "grad", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    tensors = [inputs[name] for name in order]
    library.opcheck(ops.adamw_step.default, (*tensors, 0.01, 0.9, 0.999, 1e-8, 0.1, 2, 256))
    inputs = cases.make_inputs(cases.Case("", "lion", (3, 100)))
    library.opcheck(ops.lion_step.default, (*inputs.values(), 0.01, 0.9, 0.99, 0.1, 256))
