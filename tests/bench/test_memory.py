"""Peak memory in fresh processes."""

from pathlib import Path

import pytest

from genai_perf.bench.memory import FreshProcesses


@pytest.fixture(scope="module")
def fresh():
    with FreshProcesses(path=[Path(__file__).parent]) as server:
        yield server


def test_peak_counts_memory_that_was_freed(fresh):
    usage = fresh.run("work:allocate", {"megabytes": 64})
    assert usage.value == 64 << 20
    grown = usage.peak_rss_bytes - usage.baseline_rss_bytes
    assert 63 << 20 <= grown < 80 << 20


def test_one_measurement_leaves_nothing_for_the_next(fresh):
    before = fresh.run("work:nothing", {}).peak_rss_bytes
    fresh.run("work:allocate", {"megabytes": 64})
    after = fresh.run("work:nothing", {})
    assert after.value == 7
    assert abs(after.peak_rss_bytes - before) < 2 << 20


def test_failures_are_named_and_the_server_goes_on(fresh):
    with pytest.raises(RuntimeError, match="failed with exit code 1: ValueError: the work went"):
        fresh.run("work:fail", {})
    with pytest.raises(RuntimeError, match="killed by SIGKILL: no word"):
        fresh.run("work:die", {})
    assert fresh.run("work:nothing", {}).value == 7


def test_a_preload_that_fails_is_reported():
    with (
        FreshProcesses(preload=["no_such_module"]) as server,
        pytest.raises(RuntimeError, match="No module named 'no_such_module'"),
    ):
        server.run("work:nothing", {})
