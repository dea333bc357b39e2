"""The steps of a recipe: frozen options of one solver each."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from .. import formats
from .._checks import check_choice, fail
from . import masks, owl
from .grid import IntGrid


@dataclass(frozen=True)
class RTN:
    """Round to nearest in a format of `genai_perf.formats`; options as in `genai_perf.quantize`."""

    format: str = "int4"
    group_size: int | None = None
    symmetric: bool = True
    double_quant: bool = False
    granularity: str | None = None
    method: ClassVar[str] = "rtn"
    prunes: ClassVar[bool] = False

    def __post_init__(self):
        formats.get(self.format).spec(**self.options())

    def options(self) -> dict:
        values = asdict(self)
        values.pop("format")
        return values

    @property
    def name(self) -> str:
        return f"{self.format}-rtn"


@dataclass(frozen=True)
class GPTQ:
    """GPTQ, with the options of `gptq.solve`.

    act_order None is True where it can be: not after SparseGPT, whose block thresholds it would
    upset, and not with scales="sweep". On stories260K it takes the excess loss of int4 from 0.086
    to 0.076 nats (mean of 3 calibration seeds).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scales: str = "static"
    search: bool = True
    act_order: bool | None = None
    damp_frac: float = 0.01
    block_size: int = 128
    method: ClassVar[str] = "gptq"
    prunes: ClassVar[bool] = False

    def __post_init__(self):
        IntGrid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        check_choice("GPTQ", "scales", self.scales, ("static", "sweep"))
        if self.scales == "sweep" and self.act_order:
            raise ValueError("GPTQ: act_order needs scales='static', got 'sweep'")
        _check_solver(self)

    @property
    def format(self) -> str:
        return f"int{self.bits}"

    @property
    def name(self) -> str:
        return f"{self.format}-gptq"


@dataclass(frozen=True)
class _Pruner:
    """What all pruners are asked for: one of sparsity and pattern, and how it is shared out.

    allocation "owl" gives each block its own sparsity (`owl`), which pays from some 60 %.
    """

    sparsity: float | None = None
    pattern: str | None = None
    allocation: str | None = None
    method: ClassVar[str]
    prunes: ClassVar[bool] = True

    def __post_init__(self):
        name = type(self).__name__
        masks.parse(name, self.sparsity, self.pattern)
        check_choice(name, "allocation", self.allocation, owl.ALLOCATIONS)
        if self.allocation and self.pattern:
            raise ValueError(f"{name}: allocation needs sparsity: every group of {self.pattern} "
                             f"has the same")  # fmt: skip

    @property
    def name(self) -> str:
        amount = masks.parse(self.method, self.sparsity, self.pattern)
        faithful = "-faithful" if isinstance(self, SparseGPT) and self.refine is None else ""
        return f"{self.method}-{amount}{faithful}" + (
            f"-{self.allocation}" if self.allocation else ""
        )


@dataclass(frozen=True)
class SparseGPT(_Pruner):
    """SparseGPT, with the options of `sparsegpt.solve`; refined unless refine is None."""

    refine: str | None = "cg"
    search: int = 40
    damp_frac: float = 0.01
    block_size: int = 128
    method: ClassVar[str] = "sparsegpt"

    def __post_init__(self):
        super().__post_init__()
        check_choice("SparseGPT", "refine", self.refine, (None, "cg"))
        if isinstance(self.search, bool) or not isinstance(self.search, int) or self.search < 0:
            fail("SparseGPT", "search", "a number of rounds, at least 0", repr(self.search))
        _check_solver(self)


@dataclass(frozen=True)
class Wanda(_Pruner):
    """Wanda: |weight| times input norm, no update."""

    method: ClassVar[str] = "wanda"


@dataclass(frozen=True)
class RIA(_Pruner):
    """RIA: a weight's share of its row and column, times a power of the input norm; no update."""

    power: float = 0.5
    method: ClassVar[str] = "ria"

    def __post_init__(self):
        super().__post_init__()
        if not self.power >= 0:
            fail("RIA", "power", "at least 0", self.power)


@dataclass(frozen=True)
class Magnitude(_Pruner):
    """|weight| alone, no calibration needed (with allocation "owl" it is)."""

    method: ClassVar[str] = "magnitude"


Pruner = SparseGPT | Wanda | RIA | Magnitude
Step = RTN | GPTQ | Pruner
STEPS = {step.method: step for step in (RTN, GPTQ, SparseGPT, Wanda, RIA, Magnitude)}


def _check_solver(step: GPTQ | SparseGPT) -> None:
    if not step.damp_frac >= 0:
        fail(type(step).__name__, "damp_frac", "at least 0", step.damp_frac)
    if step.block_size < 1:
        fail(type(step).__name__, "block_size", "positive", step.block_size)
