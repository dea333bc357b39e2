"""The head of a transformers model: what it is given, without the logits that it would make."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..distill import TopK

HeadCall = Callable[[torch.Tensor, nn.Linear], None]


def head_of(model: nn.Module) -> nn.Linear:
    """The output embedding, which must be a linear layer with a dense weight.

    Raises:
        ValueError: the model has none, or one that is quantized or no nn.Linear.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"distillation: the output embedding of {type(model).__name__} must be an nn.Linear "
            f"with a floating point weight, got {type(head).__name__}"
        )
    return head


@contextmanager
def at_head(model: nn.Module, call: HeadCall) -> Iterator[None]:
    """Inside, the head's forward gives `call` its input and itself, and returns no logits.

    `call` runs within the model's forward, where wrappers such as DDP and FSDP2 have their hooks
    and whole parameters.
    """
    head = head_of(model)
    before = head.__dict__.get("forward")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        call(hidden, head)
        return hidden.new_empty((*hidden.shape[:-1], 0))

    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def logit_transform(config) -> dict[str, float]:
    """What a config says happens to the head's output: softcap and logit_scale of the losses."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    if divisor := getattr(text, "logits_scaling", None):  # Granite divides
        scale = scale / divisor
    return {"softcap": float(getattr(text, "final_logit_softcapping", None) or 0.0),
            "logit_scale": float(scale)}  # fmt: skip


def hidden_at_head(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The head's input (batch, seqlen, hidden) for the model's inputs."""
    found: list[torch.Tensor] = []
    with at_head(model, lambda hidden, _: found.append(hidden)):
        model(**inputs)
    return found[0]


@torch.no_grad()
def top_k_of(model: nn.Module, input_ids: torch.Tensor, k: int, *, temperature: float = 1.0,
             vocab_size: int | None = None, rows: int = 512) -> TopK:  # fmt: skip
    """The k most likely next tokens after each position (batch, seqlen, k); the logits exist for
    `rows` positions at a time."""
    head = head_of(model)
    transform = logit_transform(model.config)
    hidden = hidden_at_head(model, {"input_ids": input_ids, "use_cache": False}).flatten(0, 1)
    parts = []
    for part in hidden.split(rows):
        z = nn.functional.linear(part, head.weight, head.bias).float()[:, :vocab_size]
        z = z * transform["logit_scale"]
        if cap := transform["softcap"]:
            z = cap * torch.tanh(z / cap)
        parts.append(TopK.from_logits(z, k, temperature=temperature))
    shape = (*input_ids.shape, k)
    return TopK(torch.cat([p.ids for p in parts]).view(shape),
                torch.cat([p.logprobs for p in parts]).view(shape), temperature=temperature
                )  # fmt: skip
