"""Perplexity of the embedded model pruned by each method, over calibration seeds.

    python benchmarks/pruning_perplexity.py [--seeds 3] [--samples 64] [--windows 40]

Every method sees the same calibration windows (the standard library's calibration modules); the
perplexity is of held-out modules. A difference counts where it exceeds the spread over seeds.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch

import genai_perf as gp
from genai_perf import models
from genai_perf.bench import evaluate
from genai_perf.bench.machine import machine

METHODS = {
    "0.5": ("magnitude-0.5", "wanda-0.5", "ria-0.5", "sparsegpt-0.5-faithful", "sparsegpt-0.5"),
    "2:4": ("magnitude-2:4", "wanda-2:4", "ria-2:4", "sparsegpt-2:4-faithful", "sparsegpt-2:4"),
    "0.7": ("wanda-0.7", "wanda-0.7-owl", "sparsegpt-0.7-faithful", "sparsegpt-0.7",
            "sparsegpt-0.7-owl"),
}  # fmt: skip


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--amounts", nargs="+", default=["2:4"], choices=list(METHODS))
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

    def perplexity(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return evaluate.perplexity(model, windows, batch_size=4).perplexity

    print(machine(), f"torch {torch.__version__}; {a.seeds} seeds, {a.samples} windows", flush=True)
    print(f"dense {perplexity(folder):.3f}", flush=True)
    for amount in a.amounts:
        for name in METHODS[amount]:
            found = []
            for seed in range(1 if name.startswith("magnitude") else a.seeds):
                with tempfile.TemporaryDirectory() as work:
                    gp.compress(folder, Path(work) / "out", name, calibration=calibration,
                                max_seqlen=256, n_samples=a.samples, seed=seed)  # fmt: skip
                    found.append(perplexity(Path(work) / "out"))
            spread = stdev(found) if len(found) > 1 else 0.0
            each = ", ".join(f"{value:.3f}" for value in found)
            print(f"{name:26s}{mean(found):8.3f} +- {spread:.3f}   ({each})", flush=True)


if __name__ == "__main__":
    main()
