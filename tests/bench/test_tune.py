"""Tuning without a GPU: the search, the table it writes, and how a configuration is forced."""

import math

import pytest
import torch

from genai_perf import BackendUnsupported
from genai_perf._backends import tuning
from genai_perf.bench import tune

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


def test_no_gpu_and_unknown_ops_are_said_in_a_sentence():
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnsupported, match="tune attention: triton"):
            tune.tune("attention")
    with pytest.raises(ValueError, match="did you mean attention"):
        tune.tune("atention")
