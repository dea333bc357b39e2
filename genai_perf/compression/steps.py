"""The steps of a recipe: frozen options of one solver each.

Each has a `kind`: steps that "fold" change weights and leave what the model computes alone, then
one may "prune", then one "quantize".
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from .. import formats
from .._checks import check_choice, check_positive, fail
from ..ops.quantize.grid import IntGrid
from . import masks, owl


@dataclass(frozen=True)
class RTN:
    """Round to nearest in a format of `genai_perf.formats`; options as in `genai_perf.quantize`.

    search None takes the scales that cover the extremes. "mse" takes among smaller ones too those
    with the least squared error of the weights; "importance" weights that error by the mean square
    of each input, which needs calibration. They know int2 to int4,
    int8, fp8 by rows and nf4.
    activations "int8" writes that a server rounds inputs to int8 too, a scale a token.
    """

    format: str = "int4"
    group_size: int | None = None
    symmetric: bool = True
    double_quant: bool = False
    granularity: str | None = None
    search: str | None = None
    activations: str | None = None
    method: ClassVar[str] = "rtn"
    kind: ClassVar[str] = "quantize"

    def __post_init__(self):
        spec = formats.get(self.format).spec(**self.options())
        check_choice("RTN", "search", self.search, (None, "mse", "importance"))
        whole = {"int8": -1, "fp8": -1, "nf4": 64}
        if self.search and not self.grouped and spec.group_size != whole.get(self.format):
            fail("RTN", "search", "None, for scales of this format and group size", self.search)
        check_choice("RTN", "activations", self.activations, (None, "int8"))
        if self.activations and self.format != "int8":
            fail("RTN", "activations", f"None with format {self.format!r}", self.activations)

    @property
    def grouped(self) -> bool:
        """Whether the format has groups of any size along a row."""
        return isinstance(formats.get(self.format), formats.IntGroups)

    def options(self) -> dict:
        values = asdict(self)
        del values["format"], values["search"], values["activations"]
        return values

    @property
    def name(self) -> str:
        kind = "w8a8" if self.activations else f"{self.format}-rtn"
        return kind + (f"-{self.search}" if self.search else "")


# grid -> (bits, group size) of GPTQ where they are not given; int has 128, and rows at 8 bits.
_GPTQ_GRIDS = {"int": (4, 128), "fp8": (8, -1), "nf4": (4, 64)}


@dataclass(frozen=True)
class GPTQ:
    """GPTQ, with the options of `gptq.solve`.

    act_order None is True where it can be: not after SparseGPT, whose block thresholds it would
    upset, and not with scales="sweep". On stories260K it takes the excess loss of int4 from 0.086
    to 0.076 nats (mean of 3 calibration seeds). grid "fp8" (a scale a row) or "nf4" rounds to the
    points of those formats. true_sequential calibrates each layer of a block on what the layers
    before it give once compressed, for about twice the time.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    scales: str = "static"
    search: bool = True
    act_order: bool | None = None
    damp_frac: float = 0.01
    block_size: int = 128
    grid: str = "int"
    double_quant: bool = False
    true_sequential: bool = False
    method: ClassVar[str] = "gptq"
    kind: ClassVar[str] = "quantize"

    def __post_init__(self):
        check_choice("GPTQ", "grid", self.grid, tuple(_GPTQ_GRIDS))
        bits, group_size = _GPTQ_GRIDS[self.grid]
        given = {"bits": bits if self.bits is None else self.bits}
        group_size = -1 if given["bits"] == 8 else group_size
        given["group_size"] = group_size if self.group_size is None else self.group_size
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if self.grid == "int":
            IntGrid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        elif given != {"bits": bits, "group_size": group_size} or not self.symmetric:
            fail("GPTQ", "bits, group_size, symmetric", f"{bits}, {group_size}, True with grid "
                 f"{self.grid!r}", f"{self.bits}, {self.group_size}, {self.symmetric}")  # fmt: skip
        if self.double_quant and self.grid != "nf4":
            fail("GPTQ", "double_quant", f"False with grid {self.grid!r}", True)
        check_choice("GPTQ", "scales", self.scales, ("static", "sweep"))
        if self.scales == "sweep" and (self.act_order or self.grid != "int"):
            clash = "act_order" if self.act_order else f"grid={self.grid!r}"
            raise ValueError(f"GPTQ: {clash} needs scales='static', got 'sweep'")
        _check_solver(self)

    @property
    def grouped(self) -> bool:
        """Whether the format has groups of any size along a row."""
        return isinstance(formats.get(self.format), formats.IntGroups)

    @property
    def format(self) -> str:
        return f"int{self.bits}" if self.grid == "int" else self.grid

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
    kind: ClassVar[str] = "prune"

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


@dataclass(frozen=True)
class Hadamard:
    """Rotates the residual stream, and with `heads` the values of each head, by matrices that are
    folded into the weights (`rotation`): outliers go, so that few bits a row suffice.

    It pays where weights have outliers. Int4 by GPTQ with a scale a row, what is added to the
    perplexity: 27.7 without and 0.33 with it on the embedded model with a tenth of its channels
    made 16 times larger; 0.31 and 0.31 on the model itself, whose rows are nearly Gaussian as they
    are (KL to the original: 9 % less)."""

    heads: bool = True
    seed: int = 0
    method: ClassVar[str] = "hadamard"
    kind: ClassVar[str] = "fold"
    name: ClassVar[str] = "hadamard"


@dataclass(frozen=True)
class SmoothQuant:
    """Moves alpha of the differences between input channels from what follows a normalization into
    its weights (`smoothing`), for 8-bit activations."""

    alpha: float = 0.5
    method: ClassVar[str] = "smoothquant"
    kind: ClassVar[str] = "fold"
    name: ClassVar[str] = "smoothquant"

    def __post_init__(self):
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 <= self.alpha <= 1:
            fail("SmoothQuant", "alpha", "from 0 to 1", repr(self.alpha))


@dataclass(frozen=True)
class AWQ:
    """Scales input channels by a power of their size, which of `steps` powers a search finds
    (`smoothing`), so that the weights of large inputs are rounded less."""

    steps: int = 20
    method: ClassVar[str] = "awq"
    kind: ClassVar[str] = "fold"
    name: ClassVar[str] = "awq"

    def __post_init__(self):
        check_positive("AWQ", steps=self.steps)


Pruner = SparseGPT | Wanda | RIA | Magnitude
Fold = Hadamard | SmoothQuant | AWQ
Step = RTN | GPTQ | Pruner | Fold
STEPS = {step.method: step for step in (RTN, GPTQ, SparseGPT, Wanda, RIA, Magnitude, Hadamard,
                                        SmoothQuant, AWQ)}  # fmt: skip


def _check_solver(step: GPTQ | SparseGPT) -> None:
    if not step.damp_frac >= 0:
        fail(type(step).__name__, "damp_frac", "at least 0", step.damp_frac)
    if step.block_size < 1:
        fail(type(step).__name__, "block_size", "positive", step.block_size)
