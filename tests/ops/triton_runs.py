"""Running the cases of Triton kernels in a process of their own: Triton reads TRITON_INTERPRET when
a kernel is decorated."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
MODES = ("interpreter", "gpu") if torch.cuda.is_available() else ("interpreter",)


def run_cases(file: str, mode: str) -> None:
    """Every test of `file` in this folder, in Triton's interpreter or on the GPU."""
    # One thread: the interpreter multiplies small matrices, which threads only slow down.
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    interpret = {"TRITON_INTERPRET": "1" if mode == "interpreter" else "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=short", str(HERE / file)],
        cwd=HERE.parent.parent, env=os.environ | threads | interpret, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
