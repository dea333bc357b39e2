"""Compression holds one block however many there are, measured as peak resident memory."""

import gc
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES

import genai_perf as gp
from genai_perf.bench.memory import FreshProcesses

BLOCK = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)  # bytes in fp16, twice that in memory


def checkpoint(folder, blocks):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1024,
                         num_attention_heads=8, num_key_value_heads=4,
                         num_hidden_layers=blocks)  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


def test_peak_does_not_grow_with_depth(tmp_path):
    preload = ["genai_perf.integrations.pipeline", "transformers.models.llama.modeling_llama"]
    with FreshProcesses(preload, path=[Path(__file__).parent]) as processes:
        added = {}
        for blocks in (4, 24):
            src = checkpoint(tmp_path / f"src{blocks}", blocks)
            folders = {"src": str(src), "dst": str(tmp_path / f"dst{blocks}")}
            usage = processes.run("memory_work:compress", folders)
            added[blocks] = usage.peak_rss_bytes - usage.baseline_rss_bytes
            files = (tmp_path / f"dst{blocks}").glob("*.safetensors")
            assert sum(f.stat().st_size for f in files) == pytest.approx(
                blocks * BLOCK / 2, rel=0.1
            )
    # 20 more blocks are 94 MB on disk and 189 MB loaded; repeated runs differ by up to 30 MB.
    assert added[24] - added[4] < 60e6


def live_bytes():
    """Bytes of all tensors that Python holds."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [o for o in gc.get_objects() if type(o) in kinds and o.device.type == "cpu"]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values()
    )


@pytest.mark.parametrize("recipe, activations", [
    ("int8-rtn", "memory"), ("int4-gptq", "memory"), ("sparsegpt-0.5+int4-gptq", "memory"),
    ("int4-gptq", "disk"),
])  # fmt: skip
def test_between_blocks_only_layer_inputs_live(saved, tmp_path, recipe, activations):
    ids, live = torch.randint(1, 96, (40, 32)), {}
    before = live_bytes()

    def watch(done, total, what):
        if what.startswith("model.layers"):
            live[done] = live_bytes() - before

    gp.compress(saved("llama"), tmp_path / "out", recipe, calibration=ids, activations=activations,
                progress=watch)  # fmt: skip
    inputs = ids.numel() * SIZES["hidden_size"] * 4 if activations == "memory" else 0
    masks_and_positions = 20e3  # what the model's own code calls its blocks with, and its buffers
    assert all(inputs <= n <= inputs + masks_and_positions for n in live.values()), live
