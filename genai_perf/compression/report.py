"""What a compression did, layer by layer, as data that report.json holds."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

SCHEMA = 1


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: the module's full name.
        shape: (out_features, in_features).
        recipe: what was done to it; "dense" where the recipe skips it.
        format: how its weight is stored, "dense" or a quantization format.
        group_size: inputs that share a scale (-1: the row); None where dense.
        sparsity: fraction of its stored weights that are zero.
        error: || (W - stored) X ||^2 / || W X ||^2 over the calibration inputs, or, where `tokens`
            is 0, || W - stored ||^2 / || W ||^2.
        tokens: calibration tokens that the layer saw.
        nbytes: bytes of its stored weight, scales and all.
        seconds: time of its solver.
        notes: what is not as the recipe says, and why.
    """

    name: str
    shape: tuple[int, int]
    recipe: str
    format: str
    group_size: int | None
    sparsity: float
    error: float
    tokens: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict) -> "LayerReport":
        """Reads what `asdict` gave, also through JSON."""
        return cls(**{**data, "shape": tuple(data["shape"]), "notes": tuple(data["notes"])})


@dataclass(frozen=True)
class Report:
    """A whole compression.

    Attributes:
        recipe: `Recipe.to_dict()`.
        name: the recipe's name.
        source, source_hash: the checkpoint folder's name, and sha256 of its config and weights.
        calibration: windows, max_seqlen, seed and sha256 of the tokens; None without calibration.
        layers: one entry for each linear of the blocks, in order.
        nbytes_before, nbytes_after: bytes of all tensors of the checkpoint.
        seconds: wall time of the whole.
        peak_rss_bytes: highest resident memory of the process so far.
        versions: of python, torch, transformers, genai_perf.
        notes: what concerns no single layer.
        quality: `Quality` on held-out text as a dict; None where no such text was given.
    """

    recipe: dict
    name: str
    source: str
    source_hash: str
    calibration: dict | None
    layers: tuple[LayerReport, ...]
    nbytes_before: int
    nbytes_after: int
    seconds: float
    peak_rss_bytes: int
    versions: dict[str, str]
    notes: tuple[str, ...] = field(default=())
    quality: dict | None = None

    @property
    def recipe_hash(self) -> str:
        """sha256 of the recipe as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()

    @property
    def error(self) -> float:
        """Mean relative error of the layers that were changed."""
        changed = [layer.error for layer in self.layers if layer.recipe != "dense"]
        return sum(changed) / len(changed) if changed else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of all reported layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(layer.sparsity * n for layer, n in zip(self.layers, sizes, strict=True))
        return zeros / sum(sizes) if sizes else 0.0

    def to_dict(self) -> dict:
        totals = {"error": self.error, "sparsity": self.sparsity}
        return {"schema": SCHEMA, **asdict(self), "recipe_hash": self.recipe_hash,
                "totals": totals}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict) -> "Report":
        """Reads what `to_dict` gave, also through JSON."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"report: schema must be {SCHEMA}, got {data.get('schema')!r}")
        values = {f.name: data[f.name] for f in fields(cls) if f.name != "quality"}
        values["quality"] = data.get("quality")  # which older reports do not have
        layers = tuple(LayerReport.from_dict(entry) for entry in values["layers"])
        values |= {"layers": layers, "notes": tuple(values["notes"])}
        return cls(**values)

    @classmethod
    def read(cls, folder: str | Path) -> "Report":
        """The report of a compressed checkpoint folder."""
        return cls.from_dict(json.loads((Path(folder) / "report.json").read_text("utf-8")))

    def __str__(self) -> str:
        """A short summary: sizes, time, the worst layer, every note, equal ones once."""
        lines = [
            f"{self.source} -> {self.name}: {self.nbytes_before / 1e6:.1f} MB -> "
            f"{self.nbytes_after / 1e6:.1f} MB in {self.seconds:.1f} s, mean relative error of "
            f"layers {self.error:.4f}, {self.sparsity:.1%} zeros"
        ]
        if self.layers:
            worst = max(self.layers, key=lambda layer: layer.error)
            lines.append(f"largest error {worst.error:.4f}: {worst.name}")
        if self.quality:
            found = self.quality
            line = (f"on {found['tokens']} held-out tokens: KL to the original {found['kl']:.4f} "
                    f"nats, same top token {found['top1']:.1%}")  # fmt: skip
            if found["perplexity"] is not None:
                line += (f", perplexity {found['perplexity_before']:.3f} -> "
                         f"{found['perplexity']:.3f}")  # fmt: skip
            lines.append(line)
        lines += self.notes
        named: dict[str, list[str]] = {}
        for layer in self.layers:
            for note in layer.notes:
                named.setdefault(note, []).append(layer.name)
        for note, names in named.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{names[0]}{more}: {note}")
        return "\n".join(lines)
