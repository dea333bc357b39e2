"""int4 in groups of 128 by GPTQModel and by us: the embedded model, the same calibration windows.

    make check-gptqmodel                      # once: makes GPTQModel's environment
    python benchmarks/against_gptqmodel.py [--seeds 3] [--python .venv-gptqmodel/bin/python]

GPTQModel runs with its defaults (7.7: group-aware order, damping 0.05, no search for scales) in its
own environment; both results are read and evaluated here, on held-out windows. Excess is
perplexity over the dense model's; KL to the dense model is the same loss without the luck of which
held-out tokens are hit: over the windows here, a standard deviation of some 0.2 nats a token is
0.01 of perplexity.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean


def quantize(src: str, ids: str, dst: str) -> None:
    """Runs in GPTQModel's environment."""
    os.cpu_count = lambda: 8  # 7.7 refuses to start where it is below 3
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(src, QuantizeConfig(bits=4, group_size=128, sym=True), device="cpu")
    windows = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in torch.load(ids)]
    model.quantize(windows, batch_size=8)
    model.save(dst)


def main() -> None:
    import torch
    from transformers import AutoTokenizer

    import genai_perf as gp
    from genai_perf import models
    from genai_perf.bench import evaluate
    from genai_perf.bench.machine import machine

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--python", default=".venv-gptqmodel/bin/python")
    parser.add_argument("--recipe", nargs="+", default=["int4-gptq"])
    parser.add_argument("--windows", type=int, help="of 512 held-out tokens, all if not given")
    a = parser.parse_args()
    folder = models.tiny_python_lm()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(split: str) -> torch.Tensor:
        texts = [text for _, text in models.stdlib_text(split)]
        return torch.tensor([t for x in texts for t in tokenizer(x, verbose=False).input_ids])

    held, calibration = tokens("heldout"), tokens("calibration")
    held = evaluate.windows(held, 512, limit=a.windows)
    dense = gp.load_compressed(folder, dtype=torch.float32)

    def loss(path) -> tuple[float, float]:
        """Perplexity, and KL of the dense model to the one in path."""
        model = gp.load_compressed(path, dtype=torch.float32)
        return (evaluate.perplexity(model, held, batch_size=8).perplexity,
                evaluate.divergence(model, dense, held, batch_size=8))  # fmt: skip

    before, _ = loss(folder)
    print(machine(), f"torch {torch.__version__}; {held.numel()} held-out tokens", flush=True)
    print(f"dense {before:.3f}", flush=True)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(a.seeds):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(calibration) - 256, (64,), generator=generator)
        windows = torch.stack([calibration[s : s + 256] for s in starts])
        with tempfile.TemporaryDirectory() as work:
            torch.save(windows, f"{work}/ids.pt")
            call = [Path(a.python).absolute(), Path(__file__).absolute(), "--quantize", folder,
                    f"{work}/ids.pt", f"{work}/out"]  # fmt: skip
            # Nothing of this environment: GPTQModel has its own torch.
            env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            subprocess.run(call, env=env, cwd=work, check=True, capture_output=True)
            found.setdefault("GPTQModel", []).append(loss(f"{work}/out"))
            for recipe in a.recipe:
                gp.compress(folder, Path(work) / recipe, recipe, calibration=windows)
                found.setdefault(recipe, []).append(loss(Path(work) / recipe))
    first = None
    for name, pairs in found.items():
        excess, kl = mean(p - before for p, _ in pairs), mean(k for _, k in pairs)
        first = first or (excess, kl)
        each = ", ".join(f"{p - before:.3f}/{1e3 * k:.2f}" for p, k in pairs)
        print(f"{name:16s} excess {excess:.3f} ({excess / first[0]:.3f} of GPTQModel's), KL "
              f"{1e3 * kl:.2f}e-3 ({kl / first[1]:.3f})   ({each})", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--quantize"]:
        quantize(*sys.argv[2:5])
    else:
        main()
