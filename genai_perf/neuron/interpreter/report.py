"""What a kernel cost: counted instructions and bytes, and from them an estimate of its time.

An estimate, from documented cycles per instruction: every engine is taken to be busy without a gap
and all engines to overlap, so the slowest one sets the time. No device was asked.
"""

from dataclasses import dataclass

from .machine import Machine
from .targets import ENGINES, Target

DMA_LATENCY = 2e-6


@dataclass(frozen=True)
class EngineUse:
    """Instructions, cycles and seconds that one engine was busy."""

    instructions: int
    cycles: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """Counts of one kernel call on one core, and an estimate of its time.

    seconds: of the busiest engine and one DMA latency (estimate).
    flops: multiplications and additions of matmuls, transposes left out.
    """

    target: Target
    engines: dict[str, EngineUse]
    by_instruction: dict[tuple[str, str], tuple[int, float]]
    hbm_read: int
    hbm_written: int
    flops: int
    fp8_flops: int
    sbuf_peak: int
    psum_peak: int

    @property
    def seconds(self) -> float:
        return max(use.seconds for use in self.engines.values()) + DMA_LATENCY

    @property
    def busiest(self) -> str:
        return max(self.engines, key=lambda name: self.engines[name].seconds)

    def share(self, engine: str) -> float:
        """Of the estimated time, the part that `engine` is busy."""
        return self.engines[engine].seconds / self.seconds

    @property
    def peak_seconds(self) -> float:
        """The matmuls' time at the target's dense peak."""
        bf16 = self.flops - self.fp8_flops
        return bf16 / self.target.peak_bf16 + self.fp8_flops / self.target.peak_fp8

    @property
    def of_peak(self) -> float:
        """Matmul flops over what the peak gives in the estimated time."""
        return self.peak_seconds / self.seconds

    @property
    def of_bandwidth(self) -> float:
        """Bytes of HBM over what its bandwidth gives in the estimated time."""
        return (self.hbm_read + self.hbm_written) / self.target.hbm_rate / self.seconds

    def __str__(self) -> str:
        lines = [f"{self.target.name} ({self.target.chip}), estimate: {1e6 * self.seconds:.1f} us, "
                 f"{self.of_peak:.0%} of peak, {self.of_bandwidth:.0%} of HBM bandwidth, "
                 f"busiest {self.busiest}"]  # fmt: skip
        for name, use in self.engines.items():
            lines.append(f"  {name:<7} {use.instructions:>7} instructions "
                         f"{1e6 * use.seconds:>9.1f} us {self.share(name):>5.0%}")  # fmt: skip
        lines.append(f"  HBM {self.hbm_read} read, {self.hbm_written} written; peak bytes of a "
                     f"partition: SBUF {self.sbuf_peak}, PSUM {self.psum_peak}")  # fmt: skip
        return "\n".join(lines)


def report(machine: Machine) -> Report:
    meter, engines = machine.meter, {}
    for name in ENGINES:
        count = sum(n for (e, _), n in meter.instructions.items() if e == name)
        cycles = sum(c for (e, _), c in meter.cycles.items() if e == name)
        clock = machine.target.clocks.get(name)
        seconds = meter.dma_seconds if clock is None else cycles / clock
        engines[name] = EngineUse(count, cycles, seconds)
    detail = {key: (n, meter.cycles[key]) for key, n in meter.instructions.items()}
    return Report(machine.target, engines, detail, meter.moved["read"], meter.moved["written"],
                  meter.flops, meter.fp8_flops, machine.chip.sbuf_peak,
                  machine.chip.psum_peak)  # fmt: skip
