"""What surrounds a measurement: caches, roofs, clocks, provenance."""

import ctypes
import subprocess
from types import SimpleNamespace

import pytest
import torch

from genai_perf.bench import caches, provenance, trace
from genai_perf.bench.roofline import Peaks, bound, measure_peaks

MIB = 1 << 20


def test_cold_copies_are_twice_the_cache():
    assert caches.copies(100 * MIB, 32 * MIB) == 1  # one set alone evicts itself
    count = caches.copies(10 * MIB, 32 * MIB)
    assert (count - 1) * 10 * MIB >= 2 * 32 * MIB  # what was used since the same copy came last
    with pytest.raises(ValueError, match="time it hot"):
        caches.copies(1000, 32 * MIB)


def test_rotation():
    seen = []
    call = caches.rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_last_level_cache(tmp_path):
    for index, size in enumerate(("32K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert caches.last_level_bytes(tmp_path) == 32 * MIB
    assert caches.last_level_bytes(tmp_path / "none") == 32 * MIB


def test_peaks_and_the_bound_that_applies():
    peaks = measure_peaks(buffer_bytes=MIB, side=64, dtypes=(torch.float32, torch.bfloat16))
    assert min(peaks.read, peaks.copy, *peaks.matmul.values()) > 0
    known = Peaks(read=10.0, copy=8.0, matmul={"float32": 100.0, "bfloat16": 50.0})
    assert bound(200, 100, torch.float32, known, "cold").by == "memory"
    assert bound(200, 100, torch.float32, known, "cold").seconds == 10.0
    # A kernel may widen, so the faster of its dtype's and float32's product is the roof.
    assert bound(2000, 100, torch.bfloat16, known, "cold") == bound(
        2000, 100, torch.float32, known, "cold")  # fmt: skip
    assert bound(200, 100, torch.float32, known, "hot").by == "compute"


class FakeNvml:
    def __init__(self):
        self.mhz, self.mask = 1980, 0

    def __getattr__(self, name):
        return lambda *arguments: 0

    def nvmlDeviceGetClockInfo(self, handle, kind, out):  # noqa: N802
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint))[0] = self.mhz
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, out):  # noqa: N802
        ctypes.cast(out, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.mask
        return 0


def test_a_throttled_round_is_marked():
    library, now = FakeNvml(), [0.0]
    found = trace.Trace(probe=trace.Nvml(library).state, clock=lambda: now[0])
    assert not found.throttled(found.look())
    now[0], library.mhz = 1.0, 1200
    assert found.throttled(found.look())
    now[0], library.mhz, library.mask = 2.0, 1980, 0x40
    assert found.look().reasons == ("heat (hardware)",)
    assert found.summary() | {"celsius": None} == {
        "looks": 3, "mhz": [1200.0, 1980.0], "celsius": None, "throttled_looks": 2,
        "reasons": ["heat (hardware)"]}  # fmt: skip


def test_clocks_are_not_read_in_every_round():
    looks, now = [], [0.0]
    probe = lambda s: looks.append(s) or trace.State(s, 2000.0)  # noqa: E731
    found = trace.Trace(probe=probe, clock=lambda: now[0])
    for _ in range(10):
        found.look()
        now[0] += 0.1
    assert len(looks) == 4


def test_a_failing_nvml_call_is_an_os_error():
    library = SimpleNamespace(nvmlInit_v2=lambda: 9)
    with pytest.raises(OSError, match="nvmlInit_v2 gave error 9"):
        trace.Nvml(library)


def test_pinning_is_undone():
    import os

    if not hasattr(os, "sched_getaffinity"):
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with trace.pinned(1, pin=True) as cores:
        assert os.sched_getaffinity(0) == set(cores) and len(cores) == 1
        assert torch.get_num_threads() == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (before, threads)


def test_uncommitted_changes_have_a_hash(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b",
                        *words], check=True, capture_output=True)  # fmt: skip

    git("init")
    (tmp_path / "f").write_text("one")
    git("add", "f")
    git("commit", "-m", "first")
    assert provenance.changes_hash(tmp_path) is None
    (tmp_path / "f").write_text("two")
    two = provenance.changes_hash(tmp_path)
    (tmp_path / "f").write_text("three")
    assert len(two) == 64 and provenance.changes_hash(tmp_path) != two


def test_triton_kernels_have_their_configuration_and_binary(monkeypatch):
    about = SimpleNamespace(num_warps=8, num_stages=3, shared=1024)
    compiled = SimpleNamespace(asm={"cubin": b"binary"}, metadata=about)
    kernel = SimpleNamespace(fn=None, device_caches={0: ({"key": compiled}, None)})
    name = "genai_perf.ops.attention.triton_stand_in"
    monkeypatch.setitem(provenance.sys.modules, name, SimpleNamespace(fwd=kernel, other=3))
    (found,) = provenance.triton_kernels("attention")
    assert (found["kernel"], found["num_warps"], len(found["cubin_sha256"])) == ("fwd", 8, 64)


def test_provenance_says_what_ran_where():
    found = provenance.provenance("cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert "flash-attn" in found["versions"]
    assert provenance.device_name(found)
    gpu = {"device": "cuda", "machine": {"gpus": [{"name": "NVIDIA H200"}]}}
    assert provenance.device_name(gpu) == "nvidia-h200"
