"""The public fixture, used as another project would use it."""

import pytest
import torch

pytest_plugins = ["pytester"]

MODULE = """
    import pytest, torch
    pytest_plugins = ["genai_perf.testing.plugin"]

    def check(out):
        assert out.sum() == 1000

    def test_same(kernel_benchmark):
        x = torch.full((1000,), 0.5)
        found = kernel_benchmark(lambda: x + x, baseline=lambda: x * 2, check=check,
                                 budget_seconds=0.3)
        assert found.verdict in ("faster", "slower", "same", "undecided")
        assert found.pair.pairs > 0

    def test_wrong(kernel_benchmark):
        x = torch.ones(1000)
        kernel_benchmark(lambda: x * 2, baseline=lambda: x, check=check)
"""


def test_fixture_in_another_project(pytester):
    pytester.makepyfile(MODULE)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, failed=1)


def test_device_that_is_not_there():
    from genai_perf import BackendUnsupported
    from genai_perf.testing.plugin import compare_kernels

    if not torch.cuda.is_available():
        with pytest.raises(BackendUnsupported, match="no GPU"):
            compare_kernels(int, baseline=int, check=bool, device="cuda")
