"""The three NeuronCores: sizes, clocks and peaks, per physical core.

Source: the Neuron architecture guides; figures that they give for a chip are divided by its cores.
"""

from dataclasses import dataclass
from types import SimpleNamespace

KIB = 1024
# The engines, as `nki.isa.engine` names them.
ENGINES = ("tensor", "vector", "scalar", "gpsimd", "dma")


@dataclass(frozen=True)
class Target:
    """One generation of NeuronCore.

    sbuf_bytes: of a partition, what the compiler keeps for itself (16 KiB) already taken off.
    clocks: cycles per second by engine.
    hbm_rate: bytes per second of HBM, the core's share; dma_rate: of its 16 DMA engines.
    peak_bf16, peak_fp8: dense operations per second.
    """

    name: str
    chip: str
    generation: int
    sbuf_bytes: int
    clocks: dict[str, float]
    hbm_rate: float
    dma_rate: float
    peak_bf16: float
    peak_fp8: float
    fp8_max: float
    psum_banks: int = 8
    bank_bytes: int = 2 * KIB


def _clocks(tensor: float, vector: float, scalar: float, gpsimd: float) -> dict[str, float]:
    values = {"tensor": tensor, "vector": vector, "scalar": scalar, "gpsimd": gpsimd}
    return {engine: 1e9 * value for engine, value in values.items()}


TARGETS = {
    target.name: target
    for target in (
        Target("gen2", "trn1, inf2", 2, 176 * KIB, _clocks(2.8, 1.12, 1.4, 1.4), 410e9, 272e9,
               92e12, 92e12, 240.0),
        Target("gen3", "trn2", 3, 208 * KIB, _clocks(2.4, 0.96, 1.2, 1.2), 362e9, 368e9,
               79e12, 158e12, 240.0),
        Target("gen4", "trn3", 4, 240 * KIB, _clocks(2.4, 1.2, 1.2, 1.2), 612e9, 528e9,
               79e12, 315e12, 448.0),
    )
}  # fmt: skip
nc_version = SimpleNamespace(gen2=2, gen3=3, gen4=4)
PARTITIONS = 128
