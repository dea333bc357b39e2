"""A student of half the embedded model's size, distilled in a plain loop, against labels alone.

    python examples/distill_tiny_lm.py --steps 150 --seeds 0 1 2

For each seed the same student (two of the four layers, 432 of 768 MLP channels) is trained twice on
the same batches: on the labels, and with the teacher. Printed: held-out loss in nats per token.
Needs the `hf` extra. `gp.distill.DistillationTrainer` does the same with transformers' Trainer.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import genai_perf as gp
from genai_perf.integrations.teacher_caching import load, text_windows
from genai_perf.models import stdlib_text, tiny_python_lm


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """Beside each position the token that comes next; nothing follows the last one."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = []
    for ids in windows.split(8):
        hidden = model.model(ids, use_cache=False).last_hidden_state
        losses.append(
            gp.distill.fused_linear_distillation_loss(
                hidden, model.lm_head.weight, labels=labels_of(ids), alpha=1.0
            )
        )
    return torch.stack(losses).mean().item()


def train(student, teacher, batches, alpha: float, lr: float) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10, (steps - step) / (0.6 * steps))
    )
    for ids in batches:
        targets = {}
        if alpha < 1:
            with torch.no_grad():
                targets["teacher_hidden"] = teacher.model(ids, use_cache=False).last_hidden_state
            targets["teacher_weight"] = teacher.lm_head.weight
        hidden = student.model(ids, use_cache=False).last_hidden_state
        loss = gp.distill.fused_linear_distillation_loss(
            hidden, student.lm_head.weight, labels=labels_of(ids), alpha=alpha, **targets
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--alpha", type=float, default=0.0, help="weight of the labels, distilled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()

    teacher, tokenizer = load(tiny_python_lm())
    windows = text_windows([text for _, text in stdlib_text("train")], tokenizer, args.seqlen)
    held = text_windows([text for _, text in stdlib_text("heldout")], tokenizer, args.seqlen)
    held = held[torch.linspace(0, len(held) - 1, 64).long()]
    size = sum(p.numel() for p in teacher.parameters())
    made = gp.distill.student_from_teacher(teacher, layers=2, intermediate_size=432)
    share = sum(p.numel() for p in made.parameters()) / size
    print(f"teacher {held_out_loss(teacher, held):.4f}, student ({share:.0%} of it) untrained "
          f"{held_out_loss(made, held):.4f} nats a token", flush=True)  # fmt: skip
    results = []
    for seed in args.seeds:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        batches = windows[order[: args.steps * args.batch]].split(args.batch)
        row = {"seed": seed}
        for name, alpha in (("labels", 1.0), ("distilled", args.alpha)):
            started = time.perf_counter()
            student = gp.distill.student_from_teacher(teacher, layers=2, intermediate_size=432)
            train(student, teacher, batches, alpha, args.lr)
            row[name] = held_out_loss(student, held)
            row[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
        results.append(row)
        print(f"seed {seed}: labels {row['labels']:.4f}, distilled {row['distilled']:.4f}",
              flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"settings": vars(args) | {"out": None},
                                        "results": results}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
