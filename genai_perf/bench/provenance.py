"""Where numbers come from: commit and uncommitted changes, versions, device, driver, compilers."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from ..neuron import host
from .machine import commit, machine, versions
from .trace import Nvml

_ROOT = Path(__file__).resolve().parents[2]


def provenance(device: str) -> dict:
    """Everything that says what was measured and on what, as JSON values; no host name."""
    from . import peers

    return {
        "commit": commit(),
        "changes_sha256": changes_hash(),
        "versions": versions() | peers.versions(),
        "torch_build": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        "machine": machine().to_dict(),
        "governor": _governor(),
        "device": device,
        "gpu": _gpu() if device == "cuda" else None,
        "neuron": host.topology().to_dict() if device == "neuron" else None,
        "ptxas": _ptxas(),
    }


def device_name(found: dict) -> str:
    """A short name for file names: the GPU's, else the processor's and its cores."""
    machine = found["machine"]
    gpus = machine["gpus"]
    if found["device"] == "cuda" and gpus:
        name = gpus[0]["name"]
    elif found["device"] == "cpu":
        name = f"{machine['cpu']} {machine['cores_usable']}core"
    else:
        name = found["device"]
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words[:6])


def changes_hash(root: Path = _ROOT) -> str | None:
    """SHA-256 of the uncommitted changes to tracked files; None if there are none, or no git."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), "diff", "HEAD", "--binary"],
                          capture_output=True, check=False)  # fmt: skip
    return hashlib.sha256(done.stdout).hexdigest() if done.stdout else None


def triton_kernels(op: str) -> list[dict]:
    """The Triton kernels of an op that have been compiled in this process: configuration and hash
    of the binary. Not run on a GPU so far."""
    package = f"genai_perf.ops.{op}."
    modules = [module for name, module in list(sys.modules.items())
               if name.startswith(package) and "triton" in name]  # fmt: skip
    found = {}
    for module in modules:
        for name, kernel in _jitted(module):
            for compiled in _compiled(kernel):
                binary = compiled.asm.get("cubin") or compiled.asm.get("hsaco")
                digest = hashlib.sha256(binary).hexdigest() if binary else None
                about = compiled.metadata
                entry = {"kernel": name, "num_warps": about.num_warps,
                         "num_stages": about.num_stages, "shared": about.shared,
                         "cubin_sha256": digest}  # fmt: skip
                found[name, digest] = entry
    return list(found.values())


def _jitted(module: ModuleType) -> list[tuple[str, object]]:
    return [(name, value) for name, value in vars(module).items()
            if hasattr(value, "device_caches") and hasattr(value, "fn")]  # fmt: skip


def _compiled(kernel) -> list:
    """Triton keeps, for each device, a tuple whose first entry maps a key to what it compiled."""
    return [one for cache in kernel.device_caches.values() for one in cache[0].values()]


def _gpu() -> dict | None:
    try:
        return Nvml().about()
    except OSError:
        return None


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


def _ptxas() -> str | None:
    """The release of the assembler that Triton brings, else of the one on the path."""
    from importlib.util import find_spec

    spec = find_spec("triton")
    paths = [Path(spec.origin).parent / "backends/nvidia/bin/ptxas"] if spec else []
    if (installed := shutil.which("ptxas")) is not None:
        paths.append(Path(installed))
    for path in paths:
        if path.exists():
            done = subprocess.run([str(path), "--version"], capture_output=True, text=True,
                                  check=False)  # fmt: skip
            return next((x.split(", ", 1)[1] for x in done.stdout.splitlines() if "release" in x),
                        None)  # fmt: skip
    return None
