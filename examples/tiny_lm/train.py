"""The training loop: Muon for the matrices, AdamW for the rest, bf16 matmuls, resumable."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from .corpus import batches


@dataclass(frozen=True)
class Settings:
    """The recipe. From step `long_from * steps` on, sequences are `long_seqlen` tokens, of which a
    step takes fewer: long sequences cost more, and a short end is enough to learn them."""

    steps: int = 3200
    batch: int = 6
    seqlen: int = 512
    long_seqlen: int = 1024
    long_from: float = 0.8
    lr_matrix: float = 0.004
    lr_embed: float = 0.005
    weight_decay: float = 0.1
    warmup: int = 50
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
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[dict] = []  # one entry every log_every steps
        self._stop = False

    def save(self) -> None:
        """Into a file beside it first, then renamed: a checkpoint is whole or the one before."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "curve": self.curve,
            "settings": asdict(self.settings),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.file)

    def load(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        if {k: v.shape for k, v in state["model"].items()} != {
            k: v.shape for k, v in self.model.state_dict().items()
        }:
            raise ValueError(
                f"{self.file} holds a model of another size: give it the same --layers"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.curve = state["seconds"], state["curve"]

    def train(self, documents: list, held_out: list[torch.Tensor]) -> bool:
        """Train to settings.steps. Ctrl-C ends after the step at work; returns whether all ran."""
        s, data = self.settings, self._batches(documents)
        before = {n: signal.signal(n, self._ask_to_stop) for n in (signal.SIGINT, signal.SIGTERM)}
        losses: list[torch.Tensor] = []
        begun, earlier = time.perf_counter(), self.seconds
        logged, logged_tokens = begun, self.tokens
        try:
            while self.step < s.steps and not self._stop:
                losses.append(self._one_step(next(data)))
                self.seconds = earlier + time.perf_counter() - begun
                if self.step % s.log_every == 0 or self.step == s.steps:
                    rate = (self.tokens - logged_tokens) / (time.perf_counter() - logged)
                    self._log(torch.stack(losses).mean().item(), rate, held_out)
                    losses, logged, logged_tokens = [], time.perf_counter(), self.tokens
                if self.step % s.save_every == 0:
                    self.save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.save()
        return self.step >= s.steps

    def _batches(self, documents: list) -> Iterator[torch.Tensor]:
        s = self.settings
        switch = round(s.steps * s.long_from)
        short = batches(documents, batch=s.batch, seqlen=s.seqlen, seed=s.seed, start=self.step)
        yield from islice(short, max(0, switch - self.step))
        yield from batches(
            documents,
            batch=max(1, s.batch * s.seqlen // s.long_seqlen),
            seqlen=s.long_seqlen,
            seed=s.seed + 1,
            start=max(0, self.step - switch),
        )

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
        self.step, self.tokens = self.step + 1, self.tokens + ids[:, 1:].numel()
        return loss.detach()

    def _log(self, loss: float, rate: float, held_out: list[torch.Tensor]) -> None:
        s = self.settings
        entry = {
            "step": self.step,
            "tokens": self.tokens,
            "train_loss": round(loss, 4),
            "tokens_per_s": round(rate),
            "seconds": round(self.seconds),
        }
        if self.step % s.eval_every == 0 or self.step == s.steps:
            entry["heldout_loss"] = round(evaluate(self.model, held_out), 4)
        self.curve.append(entry)
        left = (s.steps - self.step) * s.batch * s.seqlen / rate
        print(
            f"step {self.step}/{s.steps}  loss {loss:.3f}"
            f"  {entry['tokens_per_s']} tokens/s  {left / 60:.0f} min left"
            + (f"  held-out {entry['heldout_loss']:.3f}" if "heldout_loss" in entry else ""),
            flush=True,
        )
