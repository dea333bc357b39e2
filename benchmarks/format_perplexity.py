"""Perplexity of a model in each quantization format, as `quantize_model` makes it.

    python benchmarks/format_perplexity.py [--model FOLDER --texts FILE] [--windows 40]

Without --model: the embedded model, on modules of the standard library that it was not trained on.
FILE is JSON, a list of texts. KL is that of the dense model to the quantized one, in nats a token;
bits are those of a weight in the quantized layers, scales included.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

import genai_perf as gp
from genai_perf import models
from genai_perf.bench import evaluate
from genai_perf.bench.machine import machine
from genai_perf.nn import QuantConfig, QuantLinear

CONFIGS = {
    "int8": QuantConfig("int8"),
    "int8, activations too": QuantConfig("int8", activations="int8"),
    "int8, activations, outliers from 6.0": QuantConfig("int8", activations="int8", threshold=6.0),
    "dynamic8": QuantConfig("dynamic8"),
    "fp8 by row": QuantConfig("fp8"),
    "fp8 by tensor": QuantConfig("fp8", granularity="tensor"),
    "fp8 by 128": QuantConfig("fp8", granularity="group"),
    "fp8 by 128 x 128": QuantConfig("fp8", granularity="block"),
    "fp8_240": QuantConfig("fp8_240"),
    "fp8_e5m2": QuantConfig("fp8_e5m2"),
    "fp8_e3m4": QuantConfig("fp8_e3m4"),
    "nf4": QuantConfig("nf4"),
    "nf4, double": QuantConfig("nf4", double_quant=True),
    "fp4": QuantConfig("fp4"),
    **{
        f"{form} by {group}{', asymmetric' * (not symmetric)}{', searched' * search}": QuantConfig(
            form, group_size=group, symmetric=symmetric, search=search
        )
        for form, group in (("int4", 128), ("int3", 64), ("int2", 32))
        for symmetric in (True, False)
        for search in (False, True)
    },
}  # fmt: skip


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--texts", type=Path, help="with --model: JSON, a list of texts")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 512 tokens")
    a = parser.parse_args()
    if (a.model is None) != (a.texts is None):
        parser.error("--model and --texts go together")
    folder = a.model or models.tiny_python_lm()
    texts = [text for _, text in models.stdlib_text("heldout")]
    if a.texts:
        texts = json.loads(a.texts.read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([t for text in texts for t in tokenizer(text, verbose=False).input_ids])
    windows = evaluate.windows(ids, 512, limit=a.windows)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(machine(), f"torch {torch.__version__}; {folder.name}, {windows.numel()} tokens")
    found = evaluate.perplexity(dense, windows, batch_size=4)
    print(f"{'dense':38s} 32.00 bits {found.perplexity:8.3f}", flush=True)
    for name, config in CONFIGS.items():
        model = gp.quantize_model(copy.deepcopy(dense), config)
        found = evaluate.perplexity(model, windows, batch_size=4)
        kl = evaluate.divergence(model, dense, windows, batch_size=4)
        layers = [m.weight for m in model.modules() if isinstance(m, QuantLinear)]
        bits = 8 * sum(w.tensor().nbytes for w in layers) / sum(w.shape.numel() for w in layers)
        print(f"{name:38s} {bits:5.2f} bits {found.perplexity:8.3f}  KL {1e3 * kl:8.3f}e-3",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
