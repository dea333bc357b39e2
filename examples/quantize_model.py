"""Quantize a model in memory and generate with it, from the packed weights.

    python examples/quantize_model.py --format nf4 --prompt "def main("

Works for any torch module; here a transformers model, by default the one that comes with the
package. Needs the `hf` extra: pip install 'genaiperf[hf]'.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import genai_perf as gp
from genai_perf.models import tiny_python_lm


def megabytes(model: torch.nn.Module) -> float:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(tiny_python_lm()), help="folder or name on the Hub")
    parser.add_argument("--format", default="nf4", choices=("int8", "fp8", "nf4", "int4"))
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    before = megabytes(model)
    model = gp.patch(model, linear=args.format)  # attention and linears; without linear= attention
    print(model.genai_perf_patch)
    print(f"{before:.1f} MB -> {megabytes(model):.1f} MB")

    inputs = tokenizer(args.prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
