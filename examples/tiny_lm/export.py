"""The trained weights as a Hugging Face folder that AutoModelForCausalLM loads."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from genai_perf.bench.machine import machine, versions

from .corpus import BOS_ID, unigram_entropy
from .model import Config, TinyLM
from .train import Run


def export(model: TinyLM, config: Config, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (fp16) into folder.

    The model's own weights are rounded to what the file holds, so that its loss is the file's.
    Parameter names are transformers' own after the prefix `model.`; the head is the embedding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": value.detach().to("cpu", torch.float16).contiguous()
        for name, value in model.named_parameters()
    }
    for (name, value), parameter in zip(weights.items(), model.parameters(), strict=True):
        if not value.isfinite().all():
            raise ValueError(f"export: {name} has values that fp16 cannot hold")
        parameter.data.copy_(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.nheads,
        "num_key_value_heads": config.nheads_k,
        "head_dim": config.headdim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_positions,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
        "pad_token_id": BOS_ID,
    })  # fmt: skip
    tokens = {"bos_token_id": BOS_ID, "eos_token_id": BOS_ID, "pad_token_id": BOS_ID}
    write_json(folder / "generation_config.json", tokens)


def record(
    run: Run, *, train: list[np.ndarray], held_out: list[np.ndarray], held_out_bytes: int,
    held_out_loss: float, vocab_size: int, attention: str,
) -> dict:  # fmt: skip
    """What training.json states: the result, the settings, the raw curve and what it ran on.

    bits per byte = (loss / ln 2) * tokens / bytes, which does not depend on the tokenizer.
    """
    tokens = sum(map(len, held_out))
    entropy = unigram_entropy(train, held_out, vocab_size)
    per_byte = tokens / held_out_bytes / math.log(2)
    settings = run.settings
    return {
        "finished": run.step >= settings.steps,
        "step": run.step,
        "heldout_loss": round(held_out_loss, 4),
        "heldout_bits_per_byte": round(held_out_loss * per_byte, 4),
        "unigram_entropy": round(entropy, 4),
        "unigram_bits_per_byte": round(entropy * per_byte, 4),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens_seen": run.tokens,
        "training_tokens": sum(map(len, train)),
        "heldout_tokens": tokens,
        "heldout_bytes": held_out_bytes,
        "seconds": round(run.seconds),
        "hardware": str(machine()),
        "versions": versions(),
        "attention": attention,
        "settings": asdict(settings),
        "curve": run.curve,
    }


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
