"""Take a block and a quarter of the neurons out of the embedded model, and distil what was lost.

    python examples/prune_and_distill.py [--steps 200] [--blocks 3] [--neurons 576]

The student learns the teacher's distribution (KL divergence) on the calibration modules of the
standard library; the perplexity is that of held-out modules.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import genai_perf as gp
from genai_perf import models
from genai_perf.bench import evaluate


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--neurons", type=int, default=576)
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens a step")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 256 tokens")
    a = parser.parse_args()
    torch.manual_seed(0)
    folder = models.tiny_python_lm()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(split, count):
        texts = [text for _, text in models.stdlib_text(split)][:count]
        ids = [token for text in texts for token in tokenizer(text, verbose=False).input_ids]
        return evaluate.windows(torch.tensor(ids), 256)

    train, heldout = tokens("calibration", 40), tokens("heldout", 20)
    heldout = heldout[torch.linspace(0, len(heldout) - 1, a.windows).long()]
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as work:
        made = gp.prune_structured(folder, Path(work) / "out", calibration=train[:32],
                                   blocks=a.blocks, neurons=a.neurons)  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(Path(work) / "out", dtype=torch.float32)
    print(made)
    print(f"teacher    {evaluate.perplexity(teacher, heldout).perplexity:8.2f}")
    print(f"pruned     {evaluate.perplexity(student.eval(), heldout).perplexity:8.2f}", flush=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, a.steps)
    student.train()
    for step in range(1, a.steps + 1):
        ids = train[torch.randint(len(train), (a.batch,))]
        with torch.no_grad():
            goal = teacher(ids).logits.log_softmax(-1).flatten(0, 1)
        found = student(ids).logits.log_softmax(-1).flatten(0, 1)
        loss = F.kl_div(found, goal, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step:4d}  KL {loss.item():.3f}", flush=True)
    print(f"distilled  {evaluate.perplexity(student.eval(), heldout).perplexity:8.2f}")


if __name__ == "__main__":
    main()
