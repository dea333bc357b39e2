"""Tuning without a GPU: the search, the table it writes, and how a configuration is forced."""

import math

import pytest
import torch

from genai_perf import BackendUnsupported
from genai_perf._backends import tuning
from genai_perf.bench import tune
from genai_perf.bench.suites import suite

KEY = {"kernel": "fwd", "dtype": "bfloat16", "block_d": 64}


def lookup(folder, key=KEY, seqlen=1024):
    return tuning.lookup(folder, "nvidia-h200", "3.6.0", key, {"seqlen": seqlen})


def test_search_takes_the_fastest_that_runs():
    times = {32: 3.0, 64: math.inf, 128: 1.0}
    configs = tune.candidates({"BLOCK_M": (32, 64, 128)})
    best, seconds, before = tune.search(
        configs, lambda c: 2.0 if c is None else times[c["BLOCK_M"]]
    )
    assert (best, seconds, before) == ({"BLOCK_M": 128}, 1.0, 2.0)
    assert tune.search(configs[:2], lambda c: 2.0 if c is None else 3.0)[0] is None


def test_the_table_is_what_the_kernels_read(tmp_path):
    found = tune.Found(KEY | {"seqlen": 1024}, {"BLOCK_M": 64}, 1.0, 2.0)
    path = tmp_path / "nvidia-h200.json"
    tune.write(path, [found], "nvidia-h200", "3.6.0")
    assert lookup(tmp_path) == {"BLOCK_M": 64}
    other = tune.Found(KEY | {"kernel": "dq", "seqlen": 64}, {"BLOCK_M": 32}, 1.0, 2.0)
    tune.write(path, [other], "nvidia-h200", "3.6.0")
    tuning._table.cache_clear()
    assert lookup(tmp_path) == {"BLOCK_M": 64}  # the entry of another case stays
    assert lookup(tmp_path, KEY | {"kernel": "dq"}) == {"BLOCK_M": 32}


def test_a_configuration_is_forced_for_its_kernel_alone(tmp_path):
    seen = []
    with tuning.forced("fwd", {"BLOCK_M": 16}, seen):
        assert lookup(tmp_path) == {"BLOCK_M": 16}
        assert lookup(tmp_path, KEY | {"kernel": "dq"}) is None
    assert seen == [KEY | {"seqlen": 1024}]
    assert lookup(tmp_path) is None


class OnGpu:
    """A tensor on a GPU that is not here, as far as a configuration depends on it."""

    device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 1, 32, 128)

    @staticmethod
    def numel() -> int:
        return 32 * 128


@pytest.fixture
def h200(monkeypatch):
    from genai_perf._backends import triton as toolchain

    monkeypatch.setattr(toolchain, "device_key", lambda device: "nvidia-h200")
    monkeypatch.setattr(toolchain, "version", lambda: "3.6.0")
    monkeypatch.setattr(toolchain, "arch", lambda device: "sm_90")


def asked(op):
    """Call what chooses the configurations of an op's tunable kernels."""
    from genai_perf.ops.attention.options import Options
    from genai_perf.ops.attention.triton import configs as attention
    from genai_perf.ops.attention.triton.problem import Problem
    from genai_perf.ops.decode_attention.triton import configs as decode
    from genai_perf.ops.distill_loss.triton import launch as distill
    from genai_perf.ops.optimizer_step.triton import launch as optimizer
    from genai_perf.ops.quant_matmul.triton import configs as quant
    from genai_perf.ops.sparse_matmul.triton import launch as sparse

    if op == "decode_attention":
        return {"split": decode.choose(OnGpu, torch.int8, 128, 4, 4096)}
    if op == "distill_loss":
        return {"rows": distill.config(32768, torch.float32, OnGpu.device)}
    if op == "quant_matmul":
        return {name: quant.choose(name, OnGpu, "nf4", 64, 64) for name in ("gemv", "gemm", "dx")}
    if op == "sparse_matmul":
        return {"gemv": sparse.choose(OnGpu, OnGpu, True, 4096)}
    if op == "optimizer_step":
        return {"step": optimizer.choose(OnGpu, True, True, 256)}
    plain = dict.fromkeys(Options._fields) | {
        "window_left": -1, "window_right": 0, "softmax_scale": 1.0, "softcap": 0.0,
        "dropout_p": 0.0}  # fmt: skip
    problem = Problem(OnGpu, OnGpu, OnGpu, Options(**plain))
    return {name: attention.choose(name, problem) for name in ("fwd", "dkdv", "dq")}


@pytest.mark.parametrize("op", tune.TUNABLE)
def test_every_tunable_kernel_asks_for_its_configuration(op, h200):
    assert set(asked(op)) == {kernel.name for kernel in tune.TUNABLE[op]}
    for kernel in tune.TUNABLE[op]:
        assert kernel.phase in suite(op).PHASES
        rule = asked(op)[kernel.name]
        wanted, seen = tune.candidates(kernel.space)[-1], []
        assert rule | wanted != rule and set(wanted) - {"num_stages"} <= set(rule)
        with tuning.forced(kernel.name, wanted, seen):
            assert asked(op)[kernel.name] == rule | wanted
        assert seen and seen[0]["kernel"] == kernel.name


def test_no_gpu_and_unknown_ops_are_said_in_a_sentence():
    if not torch.cuda.is_available():
        for op in tune.TUNABLE:
            with pytest.raises(BackendUnsupported, match=f"tune {op}: triton"):
                tune.tune(op)
    with pytest.raises(ValueError, match="quantize has no Triton kernel; those that have one"):
        tune.tune("quantize")
    with pytest.raises(ValueError, match="did you mean attention"):
        tune.tune("atention")
