"""Compress the embedded model, then win back what was lost by distillation from its dense self.

    python examples/recover_compressed.py --how 2:4     SparseGPT 2:4; the zeros stay zero
    python examples/recover_compressed.py --how int4    packed int4 with low-rank adapters (QLoRA)

Printed: perplexity on held-out modules of the dense, the compressed and the recovered model, and
which share of the loss that compression cost came back. Needs the `hf` extra.
"""

import argparse
import copy
import math

import torch
from torch import nn

import genai_perf as gp
from genai_perf.compression import sparsegpt
from genai_perf.integrations.distillation import held_out_loss
from genai_perf.integrations.distillation_trainer import LossAtHead
from genai_perf.integrations.skeleton import find_blocks
from genai_perf.integrations.teacher_caching import load, text_windows
from genai_perf.models import stdlib_text, tiny_python_lm


def prune(model: nn.Module, windows: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
    """SparseGPT 2:4 on every linear of the blocks, in place; returns the masks of what stays."""
    masks = {}
    for _, block in find_blocks(model):
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        sums = {m: torch.zeros(m.in_features, m.in_features) for m in linears}

        def gather(module, args, sums=sums):
            x = args[0].detach().flatten(0, -2).float()
            sums[module] += x.T @ x

        hooks = [m.register_forward_pre_hook(gather) for m in linears]
        with torch.no_grad():
            model(windows, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        for m in linears:
            solved = sparsegpt.solve(m.weight.detach(), sums[m], pattern="2:4")
            m.weight.data.copy_(solved.weight)
            masks[m.weight] = solved.weight != 0
    return masks


class LowRank(nn.Module):
    """A frozen packed linear and a trained product of two thin matrices beside it."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.base = gp.QuantLinear.from_float(linear, "int4")
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def quantize(model: nn.Module, rank: int) -> None:
    """int4 weights in the blocks' linears with adapters, in place; all else is frozen."""
    model.requires_grad_(False)
    for _, block in find_blocks(model):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, LowRank(module, rank))


def recover(student, teacher, batches, lr: float, masks: dict) -> None:
    """The plain loop: the loss at the student's head, and zeros back to zero after each step."""
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    loss_at_head = LossAtHead(gp.distill.DistillationSettings(), teacher)
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, 1.5 * (1 - step / len(batches)))
        loss, _ = loss_at_head(student, student, {"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, mask in masks.items():
                weight.mul_(mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--how", choices=("2:4", "int4"), default="2:4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, with int4")
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    teacher, tokenizer = load(tiny_python_lm())
    windows = text_windows([text for _, text in stdlib_text("train")], tokenizer, args.seqlen)
    held = text_windows([text for _, text in stdlib_text("heldout")], tokenizer, args.seqlen)
    held = held[torch.linspace(0, len(held) - 1, 64).long()]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(args.seed))
    batches = windows[order[: args.steps * args.batch]].split(args.batch)

    student = copy.deepcopy(teacher)
    if args.how == "2:4":
        masks = prune(student, windows[order[-32:]])
    else:
        masks = {}
        quantize(student, args.rank)
    dense, compressed = (held_out_loss(m, held) for m in (teacher, student))
    recover(student, teacher, batches, args.lr or (5e-4 if masks else 1e-3), masks)
    recovered = held_out_loss(student, held)
    kept = all(not p[~mask].any() for p, mask in masks.items())
    back = (compressed - recovered) / (compressed - dense)
    before, middle, after = (math.exp(loss) for loss in (dense, compressed, recovered))
    print(
        f"{args.how}: perplexity dense {before:.2f}, compressed {middle:.2f}, recovered "
        f"{after:.2f} after {args.steps} steps; {back:.0%} of the lost loss came back"
        + (f"; zeros kept: {kept}" if masks else "")
    )


if __name__ == "__main__":
    main()
