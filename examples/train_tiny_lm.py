"""Train a small Llama on the source of Python's standard library, with the project's attention.

    python examples/train_tiny_lm.py --out tiny_lm_out --steps 200     a first look, some minutes
    python examples/train_tiny_lm.py --out tiny_lm_out --resume        go on after Ctrl-C or a crash

OUT/checkpoint.pt is written every 100 steps; OUT/model becomes a Hugging Face folder that
`AutoModelForCausalLM.from_pretrained` loads, with the loss curve in training.json.
The defaults are the recipe of the model that the package ships (genai_perf/models/tiny_python_lm).
Needs the `hf` extra (tokenizers) and torch 2.9 or later (torch.optim.Muon).
"""

import argparse
import sys
from pathlib import Path

import torch
from tiny_lm import corpus
from tiny_lm.export import export, record, write_json
from tiny_lm.model import Config, TinyLM, torch_attention
from tiny_lm.train import Run, Settings, evaluate
from tokenizers import Tokenizer

import genai_perf as gp
from genai_perf.bench.curves import curves
from genai_perf.models import stdlib_text


def arguments() -> argparse.Namespace:
    defaults, config = Settings(), Config()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and model")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch, help="sequences in a step")
    parser.add_argument("--seqlen", type=int, default=defaults.seqlen)
    parser.add_argument("--layers", type=int, default=config.layers)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    parser.add_argument(
        "--export",
        action="store_true",
        help="with --resume: write the checkpoint's model, no training",
    )
    parser.add_argument("--attention", choices=("genai_perf", "torch"), default="genai_perf")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in ("steps", "batch", "seqlen", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.seqlen > config.max_positions:
        parser.error(f"--seqlen must be at most {config.max_positions}, got {args.seqlen}")
    checkpoint = args.out / "checkpoint.pt"
    if args.export and not args.resume:
        parser.error("--export needs --resume")
    if args.resume and not checkpoint.exists():
        parser.error(f"--resume: there is no {checkpoint}")
    if checkpoint.exists() and not args.resume:
        parser.error(f"{checkpoint} exists: continue it with --resume or choose another --out")
    return args


def tokenizer_for(folder: Path, texts: list[str], config: Config) -> Tokenizer:
    """The one in folder, or a new one, trained on texts and written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        tokenizer = corpus.train_tokenizer(texts, config.vocab_size)
        corpus.save_tokenizer(tokenizer, folder, config.max_positions)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> int:
    args = arguments()
    config = Config(layers=args.layers)
    settings = Settings(
        steps=args.steps,
        batch=args.batch,
        seqlen=args.seqlen,
        long_seqlen=max(args.seqlen, min(2 * args.seqlen, config.max_positions)),
        seed=args.seed,
    )
    folder = args.out / "model"

    texts = [text for _, text in stdlib_text("train")]
    held_texts = [text for _, text in stdlib_text("heldout")]
    tokenizer = tokenizer_for(folder, texts, config)
    train, held = corpus.encode(tokenizer, texts), corpus.encode(tokenizer, held_texts)
    held_batches = corpus.held_out_batches(held, batch=8, seqlen=args.seqlen)

    torch.manual_seed(args.seed)
    model = TinyLM(config, torch_attention if args.attention == "torch" else gp.attention)
    run = Run(model, settings, args.out / "checkpoint.pt", args.device)
    if args.resume:
        try:
            run.load()
        except ValueError as error:
            print(f"train_tiny_lm.py: {error}", file=sys.stderr)
            return 2
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters,"
        f" {sum(map(len, train)) / 1e6:.2f} M training tokens, step {run.step} of {args.steps}"
    )
    if not args.export and not run.train(train, held_batches[::4]):
        print(f"stopped after step {run.step}; the same command with --resume goes on")
        return 130

    export(model, config, folder)
    result = record(
        run, train=train, held_out=held, held_out_bytes=sum(len(t.encode()) for t in held_texts),
        held_out_loss=evaluate(model, held_batches, bf16=False), vocab_size=config.vocab_size,
        attention=args.attention,
    )  # fmt: skip
    write_json(folder / "training.json", result)
    if run.curve:
        lines = {"training": "train_loss", "held-out": "heldout_loss"}
        series = {name: [(p["tokens"] / 1e6, p[key]) for p in run.curve if key in p]
                  for name, key in lines.items()}  # fmt: skip
        title = "loss in nats per token, over millions of tokens"
        (folder / "loss.svg").write_text(curves(series, title=title))
    print(
        f"held-out loss {result['heldout_loss']:.3f} nats per token"
        f" ({result['heldout_bits_per_byte']:.3f} bits per byte;"
        f" unigram {result['unigram_entropy']:.3f} and {result['unigram_bits_per_byte']:.3f});"
        f" the model is in {folder}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first step; from then on Run.train sees to it
        sys.exit(130)
