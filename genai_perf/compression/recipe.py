"""What to do to a model, as data: steps, names for the usual ones, and files."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from .. import formats
from .._checks import fail
from . import rules
from .steps import (
    AWQ,
    GPTQ,
    RIA,
    RTN,
    STEPS,
    Fold,
    Pruner,
    SmoothQuant,
    SparseGPT,
    Step,
    Wanda,
)

_PRUNER = r"(sparsegpt|wanda|ria|magnitude)-(\d+:\d+|\d*\.?\d+)(-faithful)?(?:-(owl))?"
# Names for messages and completion; `Recipe.named` takes any fraction, pattern and combination.
NAMES = (
    "int8-rtn", "fp8-rtn", "nf4-rtn", "int4-rtn", "int4-rtn-mse", "int4-rtn-importance",
    "int4-gptq", "int3-gptq", "int2-gptq", "int8-gptq", "fp8-gptq", "nf4-gptq",
    "hadamard+int4-gptq", "awq+int4-rtn", "smoothquant+w8a8", "sparsegpt-0.5", "sparsegpt-2:4",
    "sparsegpt-0.5+int4-gptq", "sparsegpt-0.7-owl", "sparsegpt-2:4-faithful",
    "magnitude-0.5", "magnitude-2:4", "wanda-0.5", "wanda-2:4", "ria-0.5", "ria-2:4",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One pruner, one quantizer, or a pruner and then a quantizer, for the linears of all blocks;
    before them what folds into the weights: Hadamard, SmoothQuant, AWQ.

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
            fail("Recipe", "steps", f"one or two of {', '.join(STEPS)}", repr(self.steps))
        kinds = tuple(step.kind for step in self.steps if step not in self.folds)
        if kinds not in (("prune",), ("quantize",), ("prune", "quantize")):
            fail("Recipe", "steps", "one pruner, one quantizer, or a pruner and then a quantizer, "
                 "with what folds before them", self.name)  # fmt: skip
        self._check_folds()
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

    def _check_folds(self) -> None:
        methods = [step.method for step in self.steps]
        folds = [step.method for step in self.folds]
        if methods[: len(folds)] != folds or len(set(folds)) < len(folds):
            fail("Recipe", "steps", "each fold once, before pruner and quantizer", self.name)
        if "hadamard" in folds[1:]:
            fail("Recipe", "steps", "hadamard first", self.name)
        if "awq" in folds and not self.quantizer:
            fail("Recipe", "steps", "a quantizer after awq", self.name)
        if any(step.kind == "fold" for _, steps in self.rules for step in steps):
            raise ValueError("Recipe: hadamard, smoothquant and awq are for all layers: they take "
                             "no rules")  # fmt: skip

    def _check_rules(self) -> None:
        if self.rules and self.pruner and self.pruner.allocation:
            raise ValueError("Recipe: allocation shares out one sparsity: it takes no rules")
        others = [Recipe(steps) for _, steps in self.rules]
        packed = {r.quantizer.format == "nf4" for r in (self, *others) if r.quantizer}
        if len(packed) > 1:
            raise ValueError("Recipe: nf4 and other formats cannot be in one checkpoint folder")
        nested = {
            r.quantizer.double_quant
            for r in (self, *others)
            if r.quantizer and r.quantizer.format == "nf4"
        }
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
        return next((step for step in self.steps if step.kind == "prune"), None)

    @property
    def quantizer(self) -> RTN | GPTQ | None:
        return next((step for step in self.steps if step.kind == "quantize"), None)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The steps that change weights and leave what the model computes alone."""
        return tuple(step for step in self.steps if step.kind == "fold")

    @property
    def name(self) -> str:
        return "+".join(step.name for step in self.steps) + (", mixed" if self.rules else "")

    @property
    def needs_calibration(self) -> bool:
        if any(Recipe(steps).needs_calibration for _, steps in self.rules):
            return True
        if self.pruner and self.pruner.allocation:
            return True
        return any(
            isinstance(step, GPTQ | SparseGPT | Wanda | RIA | SmoothQuant | AWQ)
            or (isinstance(step, RTN) and step.search == "importance")
            for step in self.steps
        )

    def at_sparsity(self, sparsity: float) -> "Recipe":
        """The same recipe with its pruner at another fraction."""
        steps = (replace(step, sparsity=sparsity) if step.kind == "prune" else step
                 for step in self.steps)  # fmt: skip
        return replace(self, steps=tuple(steps))

    def skips(self, layer: str) -> bool:
        """Whether the linear of this full name stays dense."""
        return rules.matches(self.skip, layer)

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """A recipe by name: `<format>-rtn`, `int4-gptq`, `<pruner>-<fraction or n:m>`, or a pruner
        and a quantizer joined by "+", as in "sparsegpt-0.5+int4-gptq"; before them hadamard,
        smoothquant or awq. "w8a8" is int8 with 8-bit activations. RTN may end in "-mse" or
        "-importance", the search for its scales, a pruner in "-owl", and sparsegpt in "-faithful":
        the algorithm as published, without refinement."""
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


def _nearest(word: object, valid: tuple[str, ...]) -> str:
    close = get_close_matches(str(word), valid, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}? " if close else ""


def _check_keys(what: str, data: Mapping, valid: tuple[str, ...]) -> None:
    for key in data:
        if key not in valid:
            raise ValueError(f"{what}: unknown key {key!r}; {_nearest(key, valid)}"
                             f"valid keys: {', '.join(valid)}")  # fmt: skip


def _step_named(part: str, name: str) -> Step:
    if match := re.fullmatch(r"(\w+)-rtn(?:-(mse|importance))?", part):
        if match[1] in formats.FORMATS:
            return RTN(match[1], search=match[2])
    elif match := re.fullmatch(r"int([2348])-gptq", part):
        return GPTQ(bits=int(match[1]))
    elif match := re.fullmatch(r"(fp8|nf4)-gptq", part):
        return GPTQ(grid=match[1])
    elif match := re.fullmatch(r"w8a8(?:-(mse|importance))?", part):
        return RTN("int8", search=match[1], activations="int8")
    elif part in ("hadamard", "smoothquant", "awq"):
        return STEPS[part]()
    elif match := re.fullmatch(_PRUNER, part):
        step, amount = STEPS[match[1]], match[2]
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
    if method not in STEPS:
        raise ValueError(f"recipe: unknown method {method!r}; {_nearest(method, tuple(STEPS))}"
                         f"methods: {', '.join(STEPS)}")  # fmt: skip
    options = {key: value for key, value in data.items() if key != "method"}
    step = STEPS[method]
    _check_keys(f"recipe step {method!r}", options, tuple(f.name for f in fields(step)))
    try:
        return step(**options)
    except TypeError as error:  # a value of a type that no comparison takes
        raise ValueError(f"recipe step {method!r}: {error}") from error
