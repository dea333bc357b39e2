"""What every backend of every op promises, over the ops' own cases.

The oracle comparisons, which differ from op to op, stand in tests/ops.
"""

from functools import partial
from importlib import import_module

import pytest
import torch

import genai_perf as gp
from genai_perf.ops import OPS
from genai_perf.testing.memory import guarded


def _attention(case, backend):
    inputs = import_module("genai_perf.ops.attention.cases").make_inputs(case)
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if isinstance(t, torch.Tensor)}

    def call():
        out, lse = gp.attention(**inputs, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
        return {"out": out, "lse": lse} | dict(zip(leaves, grads, strict=True))

    return leaves, call


def _decode_attention(case, backend):
    inputs = import_module("genai_perf.ops.decode_attention.cases").make_inputs(case)

    def call():
        own = inputs | {n: inputs[n].clone() for n in ("k_cache", "v_cache")}  # written in place
        out, lse = gp.decode_attention(**own, return_lse=True, backend=backend)
        return {"out": out, "lse": lse}

    return {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)}, call


def _quantize(case, backend):
    x = import_module("genai_perf.ops.quantize.cases").make_inputs(case)

    def call():
        qt = gp.quantize(x, case.format, **case.options, backend=backend)
        return qt.components() | {"dequantized": gp.dequantize(qt, backend=backend)}

    return {"x": x}, call


def _quant_matmul(case, backend):
    x, weight, bias = import_module("genai_perf.ops.quant_matmul.cases").make_inputs(case)
    x.requires_grad_()

    def call():
        y = gp.quant_matmul(x, weight, bias, backend=backend)
        return {"y": y, "dx": torch.autograd.grad(y.float().sum(), x)[0]}

    return {"x": x, **weight.components()}, call


def _distill_loss(case, backend):
    cases = import_module("genai_perf.ops.distill_loss.cases")
    student, teacher, labels = cases.make_inputs(case)
    hidden, weight, _, _ = cases.make_head(case)
    leaves = {"student": student, "hidden": hidden, "weight": weight}
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    options = {"kind": case.kind, "backend": backend} | case.options

    def call():
        loss = gp.distill.distillation_loss(student, teacher, labels, **options)
        fused = gp.distill.fused_linear_distillation_loss(
            hidden, weight, labels=labels, teacher=cases.as_keyword(teacher), **options
        )
        grads = torch.autograd.grad(loss + fused, list(leaves.values()))
        return {"loss": loss, "fused": fused} | dict(zip(leaves, grads, strict=True))

    return leaves | {"labels": labels}, call


def _sparse_matmul(case, backend):
    x, weight, bias = import_module("genai_perf.ops.sparse_matmul.cases").make_inputs(case)
    x.requires_grad_()

    def call():
        y = gp.sparse_matmul(x, weight, bias, backend=backend)
        return {"y": y, "dx": torch.autograd.grad(y.float().sum(), x)[0]}

    return {"x": x, **weight.components()}, call


def _optimizer_step(case, backend):
    ops = import_module("genai_perf.ops.optimizer_step")
    inputs = import_module("genai_perf.ops.optimizer_step.cases").make_inputs(case)

    def call():
        own = {n: None if x is None else x.clone() for n, x in inputs.items()}  # written in place
        options = {"lr": 0.01, "block_size": case.block_size or 256, "backend": backend}
        step = partial(ops.adamw_step, step=3) if case.kind == "adamw" else ops.lion_step
        step(**own, **options)
        return {n: x for n, x in own.items() if x is not None}

    return {n: x for n, x in inputs.items() if x is not None}, call


ADAPTERS = {
    "attention": _attention,
    "decode_attention": _decode_attention,
    "quantize": _quantize,
    "quant_matmul": _quant_matmul,
    "distill_loss": _distill_loss,
    "sparse_matmul": _sparse_matmul,
    "optimizer_step": _optimizer_step,
}


def combinations():
    for op in OPS:
        for case in import_module(f"genai_perf.ops.{op}.cases").CASES:
            if "smoke" in case.tags:
                for backend in ("native", "reference"):
                    yield pytest.param(op, case, backend, id=f"{op}-{case.name}-{backend}")


def test_every_op_is_here():
    assert set(ADAPTERS) == set(OPS)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


@pytest.mark.parametrize("op, case, backend", list(combinations()))
def test_promises(op, case, backend):
    inputs, call = ADAPTERS[op](case, backend)
    before = {name: bits(tensor).clone() for name, tensor in inputs.items()}
    with guarded():
        first, second = call(), call()
    for name, tensor in first.items():
        assert torch.equal(bits(tensor), bits(second[name])), f"{name} differs between two runs"
        if tensor.is_floating_point() and name != "lse":
            assert torch.isfinite(tensor.float()).all(), f"{name}: not finite from finite input"
    for name, tensor in inputs.items():
        assert torch.equal(bits(tensor), before[name]), f"input {name} was changed"


@pytest.mark.parametrize("op", OPS)
def test_backend_that_does_not_exist(op):
    case = next(c for c in import_module(f"genai_perf.ops.{op}.cases").CASES if "smoke" in c.tags)
    with pytest.raises(ValueError, match="backend must be one of .*native.*, got 'fastest'"):
        ADAPTERS[op](case, "fastest")[1]()
