"""Detection and metrics against a made-up host and recorded samples."""

from pathlib import Path

import pytest

from genai_perf.neuron import host, metrics

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return (SAMPLES / name).read_text()


@pytest.fixture
def trn2(tmp_path):
    """Device files and sysfs of a small trn2 host, with a neuron-ls that answers."""
    (tmp_path / "dev").mkdir()
    for name in ("neuron0", "neuron1", "neuron_kmon"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/devices").write_text("Character devices:\n  1 mem\n245 neuron\n")
    product = tmp_path / "sys/devices/virtual/dmi/id/product_name"
    product.parent.mkdir(parents=True)
    product.write_text("trn2.48xlarge\n")
    base = tmp_path / "sys/devices/virtual/neuron_device"
    for index in range(2):
        info = base / f"neuron{index}/info/architecture"
        info.mkdir(parents=True)
        (info / "arch_type").write_text("NCv3\n")
        (base / f"neuron{index}/core_count").write_text("8\n")
        memory = base / f"neuron{index}/neuron_core0/stats/memory_usage/device_mem"
        memory.mkdir(parents=True)
        (memory / "total").write_text("1024\n")
        (memory / "peak").write_text("4096\n")
    tools = tmp_path / "opt/aws/neuron/bin"
    tools.mkdir(parents=True)
    (tools / "neuron-ls").write_text(f"#!/bin/sh\ncat {SAMPLES / 'neuron-ls.json'}\n")
    (tools / "neuron-ls").chmod(0o755)
    return tmp_path


def test_topology(trn2):
    found = host.topology(trn2)
    assert host.is_available(trn2) and found.driver
    assert found.instance_type == "trn2.48xlarge" and found.logical_core_config == 2
    assert [d.index for d in found.devices] == [0, 1]
    assert found.devices[0] == host.Device(0, "NCv3", "gen3", 8, 103079215104)
    assert str(found) == "2 Neuron devices, NCv3, 8 cores each"


def test_a_host_without_neuron(tmp_path):
    found = host.topology(tmp_path)
    assert not host.is_available(tmp_path) and found.devices == () and not found.driver
    assert str(found) == "no Neuron device (no /dev/neuron0)"


def test_without_sysfs_and_with_a_broken_tool(trn2):
    (trn2 / "opt/aws/neuron/bin/neuron-ls").write_text("#!/bin/sh\necho oops\n")
    (trn2 / "sys/devices/virtual/neuron_device/neuron0/core_count").unlink()
    found = host.topology(trn2)
    assert found.devices[0].cores is None and found.devices[1].cores == 8


def test_neuron_ls_that_is_no_list():
    with pytest.raises(ValueError, match="a list of devices expected"):
        host.parse_neuron_ls('"trn2"')


def test_monitor():
    usage = metrics.parse_monitor(sample("neuron-monitor.json"))
    assert usage.utilization == {"0": 81.5, "1": 79.0}
    assert usage.device_bytes == 17179869184 and usage.host_bytes == 610705408
    assert (usage.latency_p50, usage.latency_p99) == (0.0081, 0.0102)
    assert (usage.completed, usage.failed) == (120, 1) and usage.errors == ("counters missing",)


@pytest.mark.parametrize("text", ("{}", '{"neuron_runtime_data": null}',
                                  '{"neuron_runtime_data": [{"report": null}, 3]}'))  # fmt: skip
def test_monitor_with_fields_missing(text):
    usage = metrics.parse_monitor(text)
    assert usage.utilization == {} and usage.device_bytes is None and usage.latency_p50 is None


def test_monitor_cut_in_half():
    with pytest.raises(ValueError, match="not a line of JSON"):
        metrics.parse_monitor(sample("neuron-monitor.json")[:200])


def test_profile():
    fields = metrics.parse_profile(sample("profile-summary.json"))
    assert fields["total_time"] == 0.000712 and fields["mfu_estimated_percent"] == 61.2
    assert "a_field_of_a_later_schema" not in fields
    with pytest.raises(ValueError, match="none of the known fields"):
        metrics.parse_profile('{"other": 1}')


def test_device_memory(trn2):
    found = metrics.device_memory(trn2)
    assert found == {f"neuron{i}/core0": {"total": 1024, "peak": 4096} for i in range(2)}
    assert metrics.reset_peaks(trn2) == 2
    assert metrics.device_memory(trn2)["neuron0/core0"]["peak"] == 0
