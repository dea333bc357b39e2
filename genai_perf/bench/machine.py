"""What a measurement ran on: processor, memory, threads, load, versions, commit. No host name."""

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

# The flags that decide which kernels run, here and in the libraries compared with.
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
_PACKAGES = (
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "accelerate",
    "compressed-tensors", "bitsandbytes", "peft", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """Hardware and its state when the measurement began; sizes in bytes.

    cores_busy: how many cores all processes together kept busy in the half second before, while
        this one slept. The load average also remembers what ended a minute ago.
    """

    cpu: str
    cpu_flags: list[str]
    isa: str | None
    cores_physical: int | None
    cores_usable: int
    cpu_quota: float | None
    torch_threads: int
    memory_bytes: int
    memory_available_bytes: int
    load_average: float
    cores_busy: float
    system: str
    gpus: list[Gpu]
    nvcc: str | None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        isa = f" ({self.isa})" if self.isa else ""
        return (f"{self.cpu}{isa}, {self.torch_threads} threads on {self.cores_usable} cores, "
                f"{self.memory_bytes / 2**30:.0f} GiB")  # fmt: skip


def machine() -> Machine:
    import torch

    from .._backends import native

    memory = psutil.virtual_memory()
    return Machine(
        cpu=_cpu_name(),
        cpu_flags=[flag for flag in _FLAGS if flag in _cpu_flags()],
        isa=None if native.unavailable() else native.lib().isa(),
        cores_physical=psutil.cpu_count(logical=False),
        cores_usable=_cores_usable(),
        cpu_quota=_cpu_quota(),
        torch_threads=torch.get_num_threads(),
        memory_bytes=memory.total,
        memory_available_bytes=memory.available,
        load_average=round(psutil.getloadavg()[0], 2),
        cores_busy=round(psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1), 2),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        gpus=_gpus(),
        nvcc=_nvcc(),
    )


def versions() -> dict[str, str | None]:
    """Version of genai_perf, Python and of each package that has a part; None: not installed."""
    from .._version import __version__

    found = {"genai_perf": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit(root: Path | None = None) -> str | None:
    """Commit of the checkout that this package runs from, with "+" if it differs; else None."""
    root = root or Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    head = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if head is None:
        return None
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changes else "")


def _output(command: list[str]) -> str | None:
    """What a command prints, stripped, or None where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo(*keys: str) -> str:
    """The first value of any of these keys in /proc/cpuinfo, "" where there is none."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in keys:
                return value.strip()
    return ""


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or "unknown"
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags", "Features").split())


def _cores_usable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _cpu_quota() -> float | None:
    """Cores that a container's limit allows (cgroup v2 cpu.max), None without a limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.exists():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _gpus() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(p.name, p.total_memory, f"sm_{p.major}{p.minor}") for p in found]


def _nvcc() -> str | None:
    """The release line of nvcc, such as "release 12.9, V12.9.41"; None where there is none."""
    path = shutil.which("nvcc")
    if path is None and Path("/usr/local/cuda/bin/nvcc").exists():
        path = "/usr/local/cuda/bin/nvcc"
    text = _output([path, "--version"]) if path else None
    return next((line.split(", ", 1)[1] for line in (text or "").splitlines() if "release" in line),
                None)  # fmt: skip
