"""class Op: the choice of a backend, on a toy op whose backends are modules made here."""

import sys
import types
import warnings

import pytest
import torch
from torch import library

import genai_perf as gp
from genai_perf._dispatch import Explanation, Op, explain

PACKAGE = "toy_op_package"


def module(name, why_not, factor):
    m = types.ModuleType(f"{PACKAGE}.{name}")
    m.why_not = why_not
    m.forward = lambda x: x * factor
    sys.modules[m.__name__] = m
    return m


@pytest.fixture(scope="module")
def op():
    sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    module("fast", lambda x: None if x.dim() == 1 else f"fast needs 1 dimension, got {x.dim()}", 2)
    module("broken", lambda x: "broken is never available", 3)
    module("reference", lambda x: None, 2)
    return Op(PACKAGE, "toy", "(Tensor x, *, str? backend=None) -> Tensor",
              fake=lambda x, *, backend=None: torch.empty_like(x),
              backends=("broken", "fast", "reference"))  # fmt: skip


def test_takes_the_first_that_can(op):
    assert op.explain(torch.ones(3)).backend == "fast"
    assert op.explain(torch.ones(3, 3)).backend == "reference"


def test_named_backend_runs_or_raises_with_its_reason(op):
    assert torch.equal(op(torch.ones(3), backend="fast"), torch.full((3,), 2.0))
    with pytest.raises(gp.BackendUnsupported, match="toy: fast needs 1 dimension, got 2"):
        op(torch.ones(3, 3), backend="fast")
    with pytest.raises(gp.BackendUnsupported, match="broken is never available"):
        op(torch.ones(3), backend="broken")
    with pytest.raises(gp.BackendUnsupported, match="cuda has no kernel for it, only broken, fast"):
        op(torch.ones(3), backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of broken, fast, reference, got 'x'"):
        op(torch.ones(3), backend="x")


def test_explain_computes_nothing_and_says_why(op):
    ran = []
    sys.modules[f"{PACKAGE}.fast"].forward = lambda x: ran.append(1) or x * 2

    def public(x, *, backend=None):
        return op(x, backend=backend)

    told = explain(public, torch.ones(3, 3))
    assert isinstance(told, Explanation) and told.backend == "reference" and not ran
    assert told.reasons["fast"] == "fast needs 1 dimension, got 2"
    assert "broken" in str(told) and "never available" in str(told)
    assert explain(public, torch.ones(3), backend="fast").backend == "fast"
    with pytest.raises(ValueError, match="runs no genai_perf op"):
        explain(lambda: None)


def test_reference_on_an_accelerator_warns_once(op):
    x = torch.ones(3, 3, device="meta")
    op._warned = False
    with pytest.warns(UserWarning, match="slow reference.*fast needs 1 dimension"):
        op._choose((x,), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op._choose((x,), None)
        op._choose((torch.ones(3, 3),), None)  # on a CPU the reference is no surprise


def test_opcheck_and_compile(op):
    library.opcheck(torch.ops.genai_perf.toy.default, (torch.randn(3, 3),))
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))


def test_backends_states_reasons():
    table = gp.backends()
    assert table["reference"] is None and table["native"] is None
    assert all(reason is None or isinstance(reason, str) for reason in table.values())
