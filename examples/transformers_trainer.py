"""A transformers Trainer with attn_implementation="genai_perf".

    python examples/transformers_trainer.py --out tuned --steps 20

Fine-tunes a causal language model (by default the one that comes with the package) on Python
sources. DataCollatorWithFlattening puts the sequences of a batch end to end, without padding.
Needs the `hf` extra: pip install 'genaiperf[hf]' (transformers, accelerate, tokenizers).
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

import genai_perf.integrations.transformers  # noqa: F401  (registers the name "genai_perf")
from genai_perf.models import stdlib_text, tiny_python_lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(tiny_python_lm()), help="folder or name on the Hub")
    parser.add_argument("--out", required=True, help="folder for the result")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="genai_perf"
    )
    # A model that is loaded already moves over with genai_perf.patch(model).
    texts = [text for _, text in stdlib_text("calibration")]
    examples = [
        {"input_ids": tokenizer(text, truncation=True, max_length=args.seqlen)["input_ids"]}
        for text in texts[: args.steps * args.batch]
    ]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-4,
            logging_steps=5,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
        ),
        train_dataset=examples,
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    trainer.save_model(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
