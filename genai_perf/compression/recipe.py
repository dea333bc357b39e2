"""What to do to a model, as data: frozen steps, names for the usual ones, and files."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

from .. import formats
from .._checks import check_choice, fail
from . import masks, owl, rules
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
class SparseGPT:
    """SparseGPT, with the options of `sparsegpt.solve`; refined unless refine is None.

    allocation "owl" gives each block its own sparsity (`owl`), which pays from some 60 %.
    """

    sparsity: float | None = None
    pattern: str | None = None
    refine: str | None = "cg"
    search: int = 30
    damp_frac: float = 0.01
    block_size: int = 128
    allocation: str | None = None
    method: ClassVar[str] = "sparsegpt"
    prunes: ClassVar[bool] = True

    def __post_init__(self):
        _check_pruner(self)
        check_choice("SparseGPT", "refine", self.refine, (None, "cg"))
        if isinstance(self.search, bool) or not isinstance(self.search, int) or self.search < 0:
            fail("SparseGPT", "search", "a number of rounds, at least 0", repr(self.search))
        _check_solver(self)

    @property
    def name(self) -> str:
        return _pruner_name(self, faithful=self.refine is None)


@dataclass(frozen=True)
class Wanda:
    """Wanda: |weight| times input norm, no update."""

    sparsity: float | None = None
    pattern: str | None = None
    allocation: str | None = None
    method: ClassVar[str] = "wanda"
    prunes: ClassVar[bool] = True

    def __post_init__(self):
        _check_pruner(self)

    @property
    def name(self) -> str:
        return _pruner_name(self)


@dataclass(frozen=True)
class RIA:
    """RIA: a weight's share of its row and column, times a power of the input norm; no update."""

    sparsity: float | None = None
    pattern: str | None = None
    power: float = 0.5
    allocation: str | None = None
    method: ClassVar[str] = "ria"
    prunes: ClassVar[bool] = True

    def __post_init__(self):
        _check_pruner(self)
        if not self.power >= 0:
            fail("RIA", "power", "at least 0", self.power)

    @property
    def name(self) -> str:
        return _pruner_name(self)


@dataclass(frozen=True)
class Magnitude:
    """|weight| alone, no calibration needed (with allocation "owl" it is)."""

    sparsity: float | None = None
    pattern: str | None = None
    allocation: str | None = None
    method: ClassVar[str] = "magnitude"
    prunes: ClassVar[bool] = True

    def __post_init__(self):
        _check_pruner(self)

    @property
    def name(self) -> str:
        return _pruner_name(self)


Pruner = SparseGPT | Wanda | RIA | Magnitude
Step = RTN | GPTQ | Pruner
_STEPS = {step.method: step for step in (RTN, GPTQ, SparseGPT, Wanda, RIA, Magnitude)}
_PRUNER = r"(sparsegpt|wanda|ria|magnitude)-(\d+:\d+|\d*\.?\d+)(-faithful)?(?:-(owl))?"
# Names for messages and completion; `Recipe.named` takes any fraction, pattern and combination.
NAMES = (
    "int8-rtn", "fp8-rtn", "nf4-rtn", "int4-rtn", "int4-gptq", "sparsegpt-0.5", "sparsegpt-2:4",
    "sparsegpt-0.5+int4-gptq", "sparsegpt-0.7-owl", "sparsegpt-2:4-faithful",
    "magnitude-0.5", "magnitude-2:4", "wanda-0.5", "wanda-2:4", "ria-0.5", "ria-2:4",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One pruner, one quantizer, or a pruner and then a quantizer, for the linears of all blocks.

    SparseGPT with refine=None followed by GPTQ is one sweep that compensates both errors together;
    refined, its weights are rounded in a second sweep, which loses less (a quarter of the error on
    layers of stories260K and of the embedded model).

    Args:
        steps: the steps in order.
        skip: linears to leave dense, by full name, by last part of the name, or as "re:" and a
            regular expression that the full name starts with.
        rules: pairs (layers as in skip, their steps) for layers that need other steps; the first
            that names a layer counts. Layers that servers fuse (q, k and v; gate and up) must be
            named together.
    """

    steps: tuple[Step, ...]
    skip: tuple[str, ...] = ("lm_head",)
    rules: tuple[tuple[str, tuple[Step, ...]], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "rules", tuple((str(m), tuple(s)) for m, s in self.rules))
        if not self.steps or not all(isinstance(step, Step) for step in self.steps):
            fail("Recipe", "steps", f"one or two of {', '.join(_STEPS)}", repr(self.steps))
        kinds = tuple(step.prunes for step in self.steps)
        if kinds not in ((True,), (False,), (True, False)):
            fail("Recipe", "steps", "one pruner, one quantizer, or a pruner and then a quantizer",
                 self.name)  # fmt: skip
        joint = self.pruner and isinstance(self.quantizer, GPTQ)
        if joint and isinstance(self.pruner, SparseGPT):
            one_sweep = self.pruner.refine is None
            if one_sweep and (self.quantizer.scales != "static" or self.quantizer.act_order):
                raise ValueError("Recipe: SparseGPT(refine=None) followed by GPTQ needs "
                                 "scales='static' and no act_order: it is one sweep")  # fmt: skip
        for entry in (*self.skip, *(layers for layers, _ in self.rules)):
            if not isinstance(entry, str):
                fail("Recipe", "skip", "names", repr(entry))
            if entry.startswith("re:"):
                rules.compile(entry)
        self._check_rules()

    def _check_rules(self) -> None:
        if self.rules and self.pruner and self.pruner.allocation:
            raise ValueError("Recipe: allocation shares out one sparsity: it takes no rules")
        others = [Recipe(steps) for _, steps in self.rules]
        packed = {r.quantizer.format == "nf4" for r in (self, *others) if r.quantizer}
        if len(packed) > 1:
            raise ValueError("Recipe: nf4 and other formats cannot be in one checkpoint folder")
        nested = {r.quantizer.double_quant for r in (self, *others)
                  if isinstance(r.quantizer, RTN) and r.quantizer.format == "nf4"}  # fmt: skip
        if len(nested) > 1:
            raise ValueError("Recipe: double_quant must be the same for all layers of a folder")

    def for_layer(self, layer: str) -> "Recipe":
        """The recipe of one linear, by full name: its rule's steps, or these."""
        for layers, steps in self.rules:
            if rules.matches((layers,), layer):
                return Recipe(steps, self.skip)
        return self if not self.rules else replace(self, rules=())

    @property
    def pruner(self) -> Pruner | None:
        return next((step for step in self.steps if step.prunes), None)

    @property
    def quantizer(self) -> RTN | GPTQ | None:
        return next((step for step in self.steps if not step.prunes), None)

    @property
    def name(self) -> str:
        return "+".join(step.name for step in self.steps) + (", mixed" if self.rules else "")

    @property
    def needs_calibration(self) -> bool:
        if any(Recipe(steps).needs_calibration for _, steps in self.rules):
            return True
        if self.pruner and self.pruner.allocation:
            return True
        return any(isinstance(step, GPTQ | SparseGPT | Wanda | RIA) for step in self.steps)

    def at_sparsity(self, sparsity: float) -> "Recipe":
        """The same recipe with its pruner at another fraction."""
        pruner = replace(self.pruner, sparsity=sparsity)
        return replace(self, steps=(pruner, *self.steps[1:]))

    def skips(self, layer: str) -> bool:
        """Whether the linear of this full name stays dense."""
        return rules.matches(self.skip, layer)

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """A recipe by name: `<format>-rtn`, `int4-gptq`, `<pruner>-<fraction or n:m>`, or a pruner
        and a quantizer joined by "+", as in "sparsegpt-0.5+int4-gptq". A pruner may end in "-owl",
        and sparsegpt in "-faithful": the algorithm as published, without refinement."""
        return cls(tuple(_step_named(part, name) for part in name.split("+")))

    def to_dict(self) -> dict:
        """Plain data that `from_dict` reads back."""
        data = {"steps": _data(self.steps), "skip": list(self.skip)}
        if self.rules:
            data["rules"] = [{"layers": m, "steps": _data(steps)} for m, steps in self.rules]
        return data

    @classmethod
    def from_dict(cls, data: Mapping) -> "Recipe":
        """Reads `{"steps": [{"method": "sparsegpt", "sparsity": 0.5}, ...], "skip": [...],
        "rules": [{"layers": "re:.*down_proj", "steps": [...]}, ...]}`.

        Raises:
            ValueError: an unknown key or method, named with the nearest valid one; a bad value.
        """
        _check_keys("recipe", data, ("steps", "skip", "rules"))
        skip = data.get("skip", ("lm_head",))
        if not isinstance(skip, list | tuple):
            fail("recipe", "skip", "a list of names", repr(skip))
        found = data.get("rules", ())
        if not isinstance(found, list | tuple) or not all(isinstance(r, Mapping) for r in found):
            fail("recipe", "rules", "a list of mappings with 'layers' and 'steps'", repr(found))
        for rule in found:
            _check_keys("recipe rule", rule, ("layers", "steps"))
            if not isinstance(rule.get("layers"), str):
                fail("recipe rule", "layers", "a name or 're:' and a regular expression",
                     repr(rule.get("layers")))  # fmt: skip
        pairs = tuple((rule["layers"], _steps_from(rule.get("steps"))) for rule in found)
        return cls(_steps_from(data.get("steps")), tuple(skip), pairs)

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Reads a .yaml, .yml or .json file with the keys of `from_dict`."""
        import yaml

        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise ValueError(f"recipe file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe file {path}: is not UTF-8 text") from error
        try:
            data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"recipe file {path}: cannot be parsed: {reason}") from error
        if not isinstance(data, Mapping):
            fail(
                f"recipe file {path}", "content", "a mapping with the key 'steps'", repr(data)[:60]
            )
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"recipe file {path}: {error}") from error

    @classmethod
    def of(cls, value: "Recipe | Step | Mapping | str | Path") -> "Recipe":
        """A recipe from any of its spellings: itself, one step, a dict, a name or a file."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Step):
            return cls((value,))
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, Path) or str(value).endswith((".yaml", ".yml", ".json")):
            return cls.from_file(value)
        if isinstance(value, str):
            return cls.named(value)
        raise TypeError("recipe must be a Recipe, a step, a dict, a name or a file, "
                        f"got {type(value).__name__}")  # fmt: skip


def _check_solver(step: GPTQ | SparseGPT) -> None:
    if not step.damp_frac >= 0:
        fail(type(step).__name__, "damp_frac", "at least 0", step.damp_frac)
    if step.block_size < 1:
        fail(type(step).__name__, "block_size", "positive", step.block_size)


def _check_pruner(step: "Pruner") -> None:
    name = type(step).__name__
    masks.parse(name, step.sparsity, step.pattern)
    check_choice(name, "allocation", step.allocation, owl.ALLOCATIONS)
    if step.allocation and step.pattern:
        raise ValueError(f"{name}: allocation needs sparsity: every group of {step.pattern} has "
                         f"the same")  # fmt: skip


def _pruner_name(step: "Pruner", *, faithful: bool = False) -> str:
    amount = masks.parse(step.method, step.sparsity, step.pattern)
    ends = ("-faithful" if faithful else "") + (f"-{step.allocation}" if step.allocation else "")
    return f"{step.method}-{amount}{ends}"


def _nearest(word: object, valid: tuple[str, ...]) -> str:
    close = get_close_matches(str(word), valid, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}? " if close else ""


def _check_keys(what: str, data: Mapping, valid: tuple[str, ...]) -> None:
    for key in data:
        if key not in valid:
            raise ValueError(f"{what}: unknown key {key!r}; {_nearest(key, valid)}"
                             f"valid keys: {', '.join(valid)}")  # fmt: skip


def _step_named(part: str, name: str) -> Step:
    if match := re.fullmatch(r"(\w+)-rtn", part):
        if match[1] in formats.FORMATS:
            return RTN(match[1])
    elif match := re.fullmatch(r"int([48])-gptq", part):
        return GPTQ(bits=int(match[1]), group_size=128 if match[1] == "4" else -1)
    elif match := re.fullmatch(_PRUNER, part):
        step, amount = _STEPS[match[1]], match[2]
        options = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
        if match[4]:
            options["allocation"] = match[4]
        if not match[3]:
            return step(**options)
        if step is SparseGPT:
            return SparseGPT(refine=None, **options)
    raise ValueError(f"recipe: unknown name {name!r}; {_nearest(name, NAMES)}names: "
                     f"{', '.join(NAMES)}, or the path of a .yaml or .json file")  # fmt: skip


def _data(steps: tuple[Step, ...]) -> list[dict]:
    return [{"method": step.method, **asdict(step)} for step in steps]


def _steps_from(data: object) -> tuple[Step, ...]:
    if not isinstance(data, list | tuple):
        fail("recipe", "steps", "a list of steps", repr(data))
    return tuple(_step_from(step) for step in data)


def _step_from(data: object) -> Step:
    if not isinstance(data, Mapping) or "method" not in data:
        fail("recipe", "each step", "a mapping with the key 'method'", repr(data)[:60])
    method = data["method"]
    if method not in _STEPS:
        raise ValueError(f"recipe: unknown method {method!r}; {_nearest(method, tuple(_STEPS))}"
                         f"methods: {', '.join(_STEPS)}")  # fmt: skip
    options = {key: value for key, value in data.items() if key != "method"}
    step = _STEPS[method]
    _check_keys(f"recipe step {method!r}", options, tuple(f.name for f in fields(step)))
    try:
        return step(**options)
    except TypeError as error:  # a value of a type that no comparison takes
        raise ValueError(f"recipe step {method!r}: {error}") from error
