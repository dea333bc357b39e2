"""Whether this is a Neuron host and what it has, from device files and sysfs: no package needed.

Order: /dev/neuron*, then sysfs for cores and architecture, then `neuron-ls -j` for the rest.
"""

import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

TOOLS = ("/opt/aws/neuron/bin",)
# Physical cores by architecture, where neither sysfs nor neuron-ls says.
_GENERATIONS = {"NCv2": "gen2", "NCv3": "gen3", "NCv4": "gen4"}


@dataclass(frozen=True)
class Device:
    """One Neuron device; None where its source does not say. memory_bytes: of its HBM."""

    index: int
    architecture: str | None
    generation: str | None
    cores: int | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Topology:
    """The Neuron devices of this host; instance_type is EC2's, logical_cores of one device."""

    devices: tuple[Device, ...]
    instance_type: str | None
    logical_core_config: int | None
    driver: bool

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        if not self.devices:
            return "no Neuron device (no /dev/neuron0)"
        first = self.devices[0]
        what = first.architecture or "unknown architecture"
        cores = f", {first.cores} cores each" if first.cores else ""
        return f"{len(self.devices)} Neuron devices, {what}{cores}"


def is_available(root: Path | str = "/") -> bool:
    """Whether there is a Neuron device file."""
    return bool(_device_files(Path(root)))


def topology(root: Path | str = "/", *, tools: tuple[str, ...] = TOOLS) -> Topology:
    """What this host has; empty on a host without Neuron devices.

    Args:
        root: where /dev, /proc and /sys are, for tests.
        tools: folders where neuron-ls may be.
    """
    root = Path(root)
    listed = _neuron_ls(root, tools)
    devices = tuple(_device(root, index, listed.get(index, {})) for index in _device_files(root))
    configs = [entry.get("logical_neuroncore_config") for entry in listed.values()]
    return Topology(
        devices=devices,
        instance_type=_text(root / "sys/devices/virtual/dmi/id/product_name"),
        logical_core_config=next((c for c in configs if isinstance(c, int)), None),
        driver=" neuron" in (_text(root / "proc/devices") or "").replace("\t", " "),
    )


def _device_files(root: Path) -> list[int]:
    found = (re.fullmatch(r"neuron(\d+)", p.name) for p in (root / "dev").glob("neuron*"))
    return sorted(int(match.group(1)) for match in found if match)


def _device(root: Path, index: int, listed: dict) -> Device:
    base = root / f"sys/devices/virtual/neuron_device/neuron{index}"
    architecture = _text(base / "info/architecture/arch_type")
    cores = _text(base / "core_count")
    count = int(cores) if cores and cores.isdigit() else listed.get("nc_count")
    memory = listed.get("memory_size")
    return Device(
        index,
        architecture,
        _GENERATIONS.get(architecture),
        count if isinstance(count, int) else None,
        memory if isinstance(memory, int) else None,
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _neuron_ls(root: Path, tools: tuple[str, ...]) -> dict[int, dict]:
    """neuron-ls -j by device; nothing if it is not there or does not answer with JSON."""
    for folder in tools:
        path = root / folder.lstrip("/") / "neuron-ls"
        if not path.exists():
            continue
        try:
            done = subprocess.run([str(path), "-j"], capture_output=True, text=True, timeout=20)
            return parse_neuron_ls(done.stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError):
            continue
    return {}


def parse_neuron_ls(text: str) -> dict[int, dict]:
    """`neuron-ls -j` by device index.

    Raises:
        ValueError: not JSON, or no list.
    """
    entries = json.loads(text)
    entries = entries.get("mlas", entries) if isinstance(entries, dict) else entries
    if not isinstance(entries, list):
        raise ValueError(f"neuron-ls: a list of devices expected, got {type(entries).__name__}")
    devices = [
        e for e in entries if isinstance(e, dict) and isinstance(e.get("neuron_device"), int)
    ]
    return {entry["neuron_device"]: entry for entry in devices}
