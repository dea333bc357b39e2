"""Tiny random models of many families, saved as transformers saves them."""

import torch

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def configs() -> dict[str, tuple]:
    """name -> (config class, arguments)."""
    import transformers as t

    grouped = {**SIZES, "num_key_value_heads": 2}
    return {
        "llama": (t.LlamaConfig, grouped),
        "llama-tied": (t.LlamaConfig, {**grouped, "tie_word_embeddings": True}),
        "gpt2": (t.GPT2Config, dict(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64)),
        "qwen2": (t.Qwen2Config, grouped),
        "qwen3": (t.Qwen3Config, {**grouped, "head_dim": 16}),
        "gemma": (t.GemmaConfig, {**grouped, "head_dim": 16}),
        "gemma2": (t.Gemma2Config, {**grouped, "head_dim": 16, "sliding_window": 4}),
        "mistral": (t.MistralConfig, {**grouped, "sliding_window": 5}),
        "opt": (t.OPTConfig, dict(vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=3,
                                  num_attention_heads=4, max_position_embeddings=64,
                                  word_embed_proj_dim=64)),
        "phi3": (t.Phi3Config, {**grouped, "pad_token_id": 0}),
        "mixtral": (t.MixtralConfig, {**grouped, "num_local_experts": 4}),
        "qwen3-moe": (t.Qwen3MoeConfig, {**grouped, "head_dim": 16, "num_experts": 8,
                                         "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        "gpt-oss": (t.GptOssConfig, {**grouped, "head_dim": 16, "num_local_experts": 4,
                                     "num_experts_per_tok": 2, "rope_parameters": PLAIN_ROPE}),
        "llama4": (t.Llama4TextConfig, {**grouped, "head_dim": 16, "intermediate_size_mlp": 128,
                                        "num_local_experts": 4, "num_experts_per_tok": 1}),
        "gpt-neox": (t.GPTNeoXConfig, SIZES),
        "bert": (t.BertConfig, SIZES),
    }  # fmt: skip


FAMILIES = list(configs())


def tiny_model(family: str, dtype: torch.dtype = torch.float32):
    """A random model of the family, with weights large enough that an error shows."""
    import transformers

    torch.manual_seed(0)
    kind, arguments = configs()[family]
    config = kind(**arguments)
    if family == "bert":
        model = transformers.BertForMaskedLM(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()
