"""The ahead-of-time gate: every shipped Triton configuration, compiled with no GPU.

    python -m genai_perf.testing.aot [--out aot.json] [--arch sm_90 ...] [--only TEXT] [--jobs N]
                                     [--against aot.json]

A kernel that spills registers, passes the chip's shared memory or lacks its matrix instruction
fails. What the compiler gives depends on Triton's version, which the report names; `--against` adds
what differs from a report of another version (`make aot TRITON=newest`).
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from .._backends import triton as toolchain
from .._backends.triton_aot import CHIPS, Compiled, compile_for

# Where Triton kernels are: each has a module `sources(arch, subset=...)`.
SHIPPED = (
    "genai_perf.compression.triton.shipped",
    "genai_perf.ops.attention.triton.shipped",
    "genai_perf.ops.decode_attention.triton.shipped",
    "genai_perf.ops.distill_loss.triton.shipped",
    "genai_perf.ops.quant_matmul.triton.shipped",
    "genai_perf.ops.quantize.triton.shipped",
    "genai_perf.ops.sparse_matmul.triton.shipped",
    "genai_perf.ops.optimizer_step.triton.shipped",
)


def _names(arch: str, *, subset: bool) -> Iterator[tuple[str, str]]:
    for module in SHIPPED:
        for source in import_module(module).sources(arch, subset=subset):
            yield module, source.name


def _compile(job: tuple[str, str, str, bool]) -> Compiled:
    """Found by name, because a jit function cannot go to another process."""
    arch, module, name, subset = job
    for source in import_module(module).sources(arch, subset=subset):
        if source.name == name:
            return compile_for(source, arch)
    raise ValueError(f"aot: no source is named {name!r}")


def gate(archs=tuple(CHIPS), *, subset: bool = False, only: str = "", jobs: int = 1):
    """Compile what ships, yielding one `Compiled` each as it is done.

    Args:
        archs: of CHIPS.
        subset: one source a kernel instead of all.
        only: a text that the names must contain.
        jobs: processes.
    """
    work = [
        (arch, module, name, subset)
        for arch in archs
        for module, name in _names(arch, subset=subset)
        if only in name
    ]
    if jobs == 1:
        yield from map(_compile, work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_compile, work)


def summary(compiled: Iterable[dict]) -> list[str]:
    """A line for each op on each chip: how many, the most registers and shared memory, and which
    kinds of matrix instructions."""
    groups = defaultdict(list)
    for entry in compiled:
        groups[entry["arch"], entry["name"].split()[0]].append(entry)
    lines = []
    for (arch, op), entries in groups.items():
        found = sorted(
            {i.split(".")[0].split("_f32")[0] for e in entries for i in e["instructions"]}
        )
        failed = sum(bool(e["problems"]) for e in entries)
        most = [max(e[name] for e in entries) for name in ("registers", "shared", "spills")]
        lines.append(f"{arch:7} {op:13} {len(entries):4} compiled, {failed} failed, at most "
                     f"{most[0]} registers, {most[1] // 1024} KiB shared, {most[2]} bytes spilled; "
                     f"{', '.join(found) or 'no matrix instruction'}")  # fmt: skip
    return lines


def differences(before: Iterable[dict], after: Iterable[dict]) -> list[str]:
    """A line for each kernel of both reports whose resources, instructions or verdict differ."""
    known = {(entry["arch"], entry["name"]): entry for entry in before}
    lines = []
    for new in after:
        old = known.get((new["arch"], new["name"]))
        changed = [] if old is None else [
            f"{field} {old[field]} -> {new[field]}"
            for field in ("registers", "spills", "shared", "instructions", "problems")
            if old[field] != new[field]
        ]  # fmt: skip
        if changed:
            lines.append(f"{new['arch']} {new['name']}: {'; '.join(changed)}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m genai_perf.testing.aot", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--arch", nargs="+", choices=tuple(CHIPS), default=tuple(CHIPS))
    parser.add_argument("--only", default="", help="a text that the names must contain")
    parser.add_argument("--subset", action="store_true", help="one source a kernel")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--against", type=Path, help="an earlier report to compare with")
    options = parser.parse_args(argv)
    against = options.against and json.loads(options.against.read_text(encoding="utf-8"))
    done = []
    found = gate(options.arch, subset=options.subset, only=options.only, jobs=options.jobs)
    for result in found:
        done.append(result)
        verdict = "; ".join(result.problems) or "ok"
        print(f"{result.arch:7} {result.name:45} {result.registers:4} registers "
              f"{result.shared // 1024:4} KiB  {verdict}", flush=True)  # fmt: skip
    failed = [result for result in done if result.problems]
    report = {"triton": toolchain.version(), "compiled": [asdict(result) for result in done]}
    report["summary"] = summary(report["compiled"])
    if against:
        changed = differences(against["compiled"], report["compiled"])
        report |= {"against": against["triton"], "differences": changed}
        print(f"{len(changed)} differ from Triton {against['triton']}", *changed, sep="\n")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(*report["summary"], sep="\n")
    print(f"{len(done)} compiled, {len(failed)} failed, Triton {toolchain.version()}")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
