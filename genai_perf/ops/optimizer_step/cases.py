"""The cases that tests and benchmarks share."""

from dataclasses import dataclass

import torch

from ...formats.base import ceil_div


@dataclass(frozen=True)
class Case:
    """One parameter, its gradient and its moments in the middle of training."""

    name: str
    kind: str  # "adamw" or "lion"
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    block_size: int | None = 256  # None: moments in fp32
    tags: frozenset[str] = frozenset()


def _cases() -> tuple[Case, ...]:
    found = []
    for kind in ("adamw", "lion"):
        add = lambda name, *args, tags, kind=kind: found.append(  # noqa: E731
            Case(f"{kind}-{name}", kind, *args, tags=frozenset(tags))
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            add(name, (33, 70), dtype, dtype, tags={"smoke"})
            add(f"4096-{name}", (4096, 4096), dtype, dtype, tags={"bench"})
        add("bf16-fp32-grad", (20, 300), torch.bfloat16, torch.float32, 64, tags={"smoke"})
        add("fp32-moments", (9, 129), torch.float32, torch.float32, None, tags={"smoke"})
        add("one", (1,), tags={"edge"})
        add("block-4096", (2, 5000), torch.float32, torch.float32, 4096, tags={"edge"})
        add("empty", (0, 8), tags={"edge"})
    return tuple(found)


CASES = _cases()


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor | None]:
    """The tensors of a step by name; gradients and moments cover six decades, some are 0."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(case.shape).numel()
    wide = 10.0 ** (6 * torch.rand(case.shape, generator=generator) - 5)
    grad = torch.randn(case.shape, generator=generator) * wide
    grad[torch.rand(case.shape, generator=generator) < 0.05] = 0
    p = torch.randn(case.shape, generator=generator)
    given = {"p": p.to(case.dtype), "grad": grad.to(case.grad_dtype)}
    for name in ("exp_avg", "exp_avg_sq")[: 2 if case.kind == "adamw" else 1]:
        if case.block_size is None:
            moment, scale = grad * 0.5 if name == "exp_avg" else grad.square() * 0.3, None
        else:
            low = 64 if name == "exp_avg_sq" else 0  # as large as its gradients make it
            moment = torch.randint(low, 256, case.shape, generator=generator, dtype=torch.uint8)
            scale = torch.rand(ceil_div(count, case.block_size), generator=generator)
        given |= {name: moment, f"{name}_scale": scale}
    return {name: t if t is None else t.to(device) for name, t in given.items()}


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes): the parameter and its moments are read and written, the gradient read."""
    count = torch.Size(case.shape).numel()
    moments = 2 if case.kind == "adamw" else 1
    held = 4 * count if case.block_size is None else count + 4 * ceil_div(count, case.block_size)
    moved = 2 * (case.dtype.itemsize * count + moments * held) + case.grad_dtype.itemsize * count
    return 14 * count, moved
