"""Everything on a GPU, in one command: the oracle first, then every case against every peer.

    python benchmarks/gpu.py FOLDER [--minutes 9]

Each op has its own process and its own result file in FOLDER, so that a lost device ends one op
and not the run; run again, it goes on with the ops whose file is not whole. The page is written
after each op. Not run on a GPU so far.
"""

import argparse
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch

from genai_perf import BackendUnsupported
from genai_perf.bench import page, results
from genai_perf.bench.machine import commit
from genai_perf.bench.suites import SUITES, own_names, suite

# Of a row: what is not its rounds, such as its inputs, the oracle and the warm-up.
ROW_OVERHEAD = 1.0


def gate(op: str, device: str) -> tuple[list[str], list[str]]:
    """Every own variant on the first headline case that it takes, each phase, against the oracle:
    what is wrong, and the variants that ran."""
    room = suite(op)
    wrong, ran = [], []
    for name, phase in product(own_names(op), room.PHASES):
        reason = None
        for case in map(room.cases().get, room.HEADLINE):
            problem = room.make(case, phase, device, seed=1)
            with torch.set_grad_enabled("backward" in phase):
                try:
                    variant = room.own(problem, name)
                    outputs = variant.result(variant.call())
                except BackendUnsupported as error:
                    reason = reason or f"  {op} {phase} {name}: {error}"
                    continue
            found = room.check(problem, outputs, variant.numerics, variant.weight)
            ran.append(name)
            if not found.passed:
                wrong.append(f"{op} {case.name} {phase} {name}: error {found.error:.3g}, "
                             f"allowed {found.allowed:.3g}")  # fmt: skip
            break
        else:
            print(reason)
    return wrong, [name for name in dict.fromkeys(ran) if name != "reference"]


def whole(path: Path) -> bool:
    """Whether a file holds all rows of its op, measured at this commit."""
    if not path.exists():
        return False
    try:
        report = results.load(path)
    except ValueError:
        return False
    return report["provenance"]["commit"] == commit() and not report.get("left_out")


def measure(op: str, variants: list[str], path: Path, seconds: float, device: str) -> int:
    room = suite(op)
    rows = len(room.cases()) * len(room.PHASES)
    budget = max(0.5, seconds / rows - ROW_OVERHEAD)
    command = [sys.executable, "-m", "genai_perf.cli", "bench", "run", op, "--device", device,
               "--against", "all", "--backend", ",".join(variants), "--phase", "all",
               "--no-memory", "--budget", f"{budget:.1f}", "--total", f"{seconds:.0f}",
               "--out", str(path)]  # fmt: skip
    return subprocess.run(command, check=False, timeout=seconds + 60).returncode


def main(argv: list[str] | None = None, *, device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    a = parser.parse_args(argv)
    if device == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * a.minutes
    a.folder.mkdir(parents=True, exist_ok=True)
    gates = {op: gate(op, device) for op in SUITES}
    wrong = [line for lines, _ in gates.values() for line in lines]
    if wrong:
        print("the conformance gate is red, nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    todo = [op for op in SUITES if not whole(a.folder / f"{op}.json")]
    failed = False
    for i, op in enumerate(todo):
        left = end - time.monotonic() - 10
        if left < 20:
            print(f"no time left for {', '.join(todo[i:])}; run it again to go on")
            break
        try:
            failed |= measure(op, gates[op][1], a.folder / f"{op}.json",
                              left / (len(todo) - i), device) == 1  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{op}: took too long and was ended", file=sys.stderr)
            failed = True
        files = [path for name in SUITES if (path := a.folder / f"{name}.json").exists()]
        if files:
            page.write(files, a.folder / "report.html")
    print(a.folder / "report.html")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
