import json
import shutil

import pytest

from genai_perf.models import stdlib_text, tiny_python_lm


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random Llama of 0.3 M parameters with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-random"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_python_lm() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Three modules of the standard library, one a line."""
    file = tmp_path_factory.mktemp("texts") / "modules.jsonl"
    texts = [text for _, text in stdlib_text("heldout")][:6]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
