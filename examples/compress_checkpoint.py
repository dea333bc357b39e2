"""Compress a checkpoint folder with GPTQ, and run the result from its packed weights.

    python examples/compress_checkpoint.py --out tiny-int4 --recipe int4-gptq

The result is a folder that transformers and vLLM load as it is. One decoder block is in memory at a
time, and an interrupted run goes on where it was when started again.
Needs the `hf` extra: pip install 'genaiperf[hf]'.
"""

import argparse

import torch
from transformers import AutoTokenizer

import genai_perf as gp
from genai_perf.models import stdlib_text, tiny_python_lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(tiny_python_lm()), help="checkpoint folder")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--recipe", default="int4-gptq", help="name, or a .yaml or .json file")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()

    # Calibrate on text like that which the model will see.
    texts = [text for _, text in stdlib_text("calibration")]
    report = gp.compress(
        args.model,
        args.out,
        args.recipe,
        calibration=texts,
        max_seqlen=args.seqlen,
        n_samples=args.samples,
        progress=lambda done, total, now: print(f"{done}/{total} {now}"),
    )
    print(report)

    model = gp.patch(gp.load_compressed(args.out, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    inputs = tokenizer("def main(", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main()
