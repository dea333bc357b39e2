"""The training loop: Muon for the matrices, AdamW for the rest, bf16 matmuls, resumable."""

import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .corpus import batches


@dataclass(frozen=True)
class Settings:
    steps: int = 2000
    batch: int = 8
    seqlen: int = 512
    lr_matrix: float = 0.01
    lr_embed: float = 0.003
    weight_decay: float = 0.1
    warmup: int = 40
    decay: float = 0.6
    seed: int = 0
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 100


def schedule(step: int, settings: Settings) -> float:
    """Factor on the learning rates: linear warm-up, constant, linear to 0 over the last `decay`."""
    left = (settings.steps - step) / settings.steps
    return min(1.0, (step + 1) / settings.warmup, left / settings.decay)


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(
            matrices,
            lr=settings.lr_matrix,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=settings.lr_embed, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def evaluate(model: nn.Module, data: list[torch.Tensor], *, bf16: bool = True) -> float:
    """Mean loss in nats per token over batches (n, seqlen + 1)."""
    total = tokens = 0.0
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        for ids in data:
            count = ids.shape[0] * (ids.shape[1] - 1)
            total += model.loss(ids.to(device)).item() * count
            tokens += count
    return total / tokens


class Run:
    """A model on its way: what a checkpoint holds, and the loop that moves it on."""

    def __init__(self, model: nn.Module, settings: Settings, file: Path, device: str = "cpu"):
        self.model, self.settings, self.file, self.device = model.to(device), settings, file, device
        self.optimizers = make_optimizers(model, settings)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict] = []  # one entry every log_every steps
        self._stop = False

    def save(self) -> None:
        """Into a file beside it first, then renamed: a checkpoint is whole or the one before."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "settings": asdict(self.settings),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.file)

    def load(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def train(self, documents: list, held_out: list[torch.Tensor]) -> bool:
        """Train to settings.steps. Ctrl-C ends after the step at work; returns whether all ran."""
        s = self.settings
        data = batches(
            documents, batch=s.batch, seqlen=s.seqlen, seed=s.seed, start=self.step
        )  # fmt: skip
        before = {n: signal.signal(n, self._ask_to_stop) for n in (signal.SIGINT, signal.SIGTERM)}
        losses: list[torch.Tensor] = []
        begun = logged = time.perf_counter()
        earlier = self.seconds
        try:
            while self.step < s.steps and not self._stop:
                losses.append(self._one_step(next(data)))
                self.seconds = earlier + time.perf_counter() - begun
                if self.step % s.log_every == 0 or self.step == s.steps:
                    elapsed = time.perf_counter() - logged
                    self._log(torch.stack(losses), elapsed, held_out)
                    losses, logged = [], time.perf_counter()
                if self.step % s.save_every == 0:
                    self.save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.save()
        return self.step >= s.steps

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stop = True

    def _one_step(self, ids: torch.Tensor) -> torch.Tensor:
        factor = schedule(self.step, self.settings)
        for optimizer, lr in zip(
            self.optimizers, (self.settings.lr_matrix, self.settings.lr_embed), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model.loss(ids.to(self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def _log(self, losses: torch.Tensor, elapsed: float, held_out: list[torch.Tensor]) -> None:
        s = self.settings
        per_step = s.batch * s.seqlen
        entry = {
            "step": self.step,
            "tokens": self.step * per_step,
            "train_loss": round(losses.mean().item(), 4),
            "tokens_per_s": round(len(losses) * per_step / elapsed),
            "seconds": round(self.seconds),
        }
        if self.step % s.eval_every == 0 or self.step == s.steps:
            entry["heldout_loss"] = round(evaluate(self.model, held_out), 4)
        self.curve.append(entry)
        left = (s.steps - self.step) * elapsed / len(losses)
        print(
            f"step {self.step}/{s.steps}  loss {entry['train_loss']:.3f}"
            f"  {entry['tokens_per_s']} tokens/s  {left / 60:.0f} min left"
            + (f"  held-out {entry['heldout_loss']:.3f}" if "heldout_loss" in entry else ""),
            flush=True,
        )
