"""Perplexity of the embedded model compressed by each method, over calibration seeds.

    python benchmarks/compression_perplexity.py [--groups int4 2:4] [--seeds 3] [--samples 64]

Every method sees the same calibration windows (the standard library's calibration modules); the
perplexity is of held-out modules. A difference counts where it exceeds the spread over seeds.
"excess" is what a method adds to the perplexity of the dense model, KL is that of the dense model
to the method's, which depends less on which tokens are held out, each beside its ratio to that of
the first method of the group. A seed chooses calibration windows and rotations.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch

import genai_perf as gp
from genai_perf import models
from genai_perf.bench import evaluate
from genai_perf.bench.machine import machine
from genai_perf.compression import GPTQ, RTN, Hadamard, Recipe


def _names(*names: str) -> dict[str, Recipe]:
    return {name: Recipe.named(name) for name in names}


GROUPS = {
    "0.5": _names("magnitude-0.5", "wanda-0.5", "ria-0.5", "sparsegpt-0.5-faithful",
                  "sparsegpt-0.5"),
    "2:4": _names("magnitude-2:4", "wanda-2:4", "ria-2:4", "sparsegpt-2:4-faithful",
                  "sparsegpt-2:4"),
    "0.7": _names("wanda-0.7", "wanda-0.7-owl", "sparsegpt-0.7-faithful", "sparsegpt-0.7",
                  "sparsegpt-0.7-owl"),
    "int4": _names("int4-rtn", "int4-rtn-mse", "int4-rtn-importance") | {
        "int4-gptq, published": Recipe((GPTQ(search=False, act_order=False),)),
        "int4-gptq, act order": Recipe((GPTQ(search=False),)),
        "int4-gptq": Recipe((GPTQ(),)),
        "int4-gptq, sequential": Recipe((GPTQ(true_sequential=True),)),
        "int4-gptq, asymmetric": Recipe((GPTQ(symmetric=False),)),
    },
    "nf4": _names("nf4-rtn", "nf4-rtn-importance", "nf4-gptq"),
    "fp8": _names("fp8-rtn", "fp8-rtn-importance", "fp8-gptq"),
    "channel": {
        "int4-rtn by channel": Recipe((RTN("int4", group_size=-1),)),
        "hadamard, int4-rtn by channel": Recipe((Hadamard(), RTN("int4", group_size=-1))),
        "int4-gptq by channel, published": Recipe((GPTQ(group_size=-1, search=False),)),
        "hadamard, published": Recipe((Hadamard(), GPTQ(group_size=-1, search=False))),
        "int4-gptq by channel": Recipe((GPTQ(group_size=-1),)),
        "hadamard, int4-gptq by channel": Recipe((Hadamard(), GPTQ(group_size=-1))),
    },
    "folds": _names("int4-rtn", "awq+int4-rtn", "awq+int4-gptq", "hadamard+int4-gptq"),
    "w8a8": _names("w8a8", "smoothquant+w8a8"),
}  # fmt: skip


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", default=["int4"], choices=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 512 tokens")
    a = parser.parse_args()
    folder = models.tiny_python_lm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for _, text in models.stdlib_text("heldout")]
    ids = torch.tensor([t for text in texts for t in tokenizer(text, verbose=False).input_ids])
    windows = evaluate.windows(ids, 512, limit=a.windows)
    calibration = [text for _, text in models.stdlib_text("calibration")][:60]

    def load(path, zero_points=False):
        if zero_points:  # packed, which transformers does not load
            return gp.load_compressed(path, dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def loss(model) -> tuple[float, float]:
        return (evaluate.perplexity(model, windows, batch_size=4).perplexity,
                evaluate.divergence(model, original, windows, batch_size=4))  # fmt: skip

    print(machine(), f"torch {torch.__version__}; {a.seeds} seeds, {a.samples} windows", flush=True)
    original = load(folder)
    dense, _ = loss(original)
    print(f"dense {dense:.3f}", flush=True)
    for group in a.groups:
        first = None
        for name, recipe in GROUPS[group].items():
            found = []
            for seed in range(a.seeds if recipe.needs_calibration or recipe.folds else 1):
                steps = (replace(step, seed=seed) if isinstance(step, Hadamard) else step
                         for step in recipe.steps)  # fmt: skip
                with tempfile.TemporaryDirectory() as work:
                    gp.compress(folder, Path(work) / "out", replace(recipe, steps=tuple(steps)),
                                calibration=calibration, max_seqlen=256, n_samples=a.samples,
                                seed=seed)  # fmt: skip
                    zero_points = not getattr(recipe.quantizer, "symmetric", True)
                    found.append(loss(load(Path(work) / "out", zero_points)))
            values, kls = zip(*found, strict=True)
            spread = stdev(values) if len(values) > 1 else 0.0
            excess, kl = mean(values) - dense, mean(kls)
            first = first or (excess, kl)
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{name:32s}{mean(values):8.3f} +- {spread:.3f}  excess {excess:7.3f}, "
                  f"{excess / first[0]:.3f} of the first, KL {1e3 * kl:.2f}e-3, "
                  f"{kl / first[1]:.3f}   ({each})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
