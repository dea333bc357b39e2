"""The side file: small, ignored by other loaders, picked up by load_compressed, never stale."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import genai_perf as gp
from genai_perf.io.sparse_file import NAME, read_sparse
from genai_perf.nn import SparseLinear

IDS = torch.randint(1, 96, (6, 16), generator=torch.Generator().manual_seed(0))


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe, layout", [("magnitude-2:4", "2:4"), ("magnitude-0.5", "bitmask")])
def test_pruned_folder(saved, tmp_path, family, recipe, layout):
    src, dst = saved(family), tmp_path / "out"
    gp.compress(src, dst, recipe)
    before = {file.name: file.read_bytes() for file in dst.iterdir()}
    made = gp.pack_sparse(dst)
    assert {f.name for f in dst.iterdir()} == {*before, NAME}
    assert all((dst / name).read_bytes() == content for name, content in before.items())
    # A 2:4 recipe's layers all fit 2:4; an unstructured one's may, by chance, where they are small.
    assert set(made.layers.values()) <= {layout, "2:4"} and layout in made.layers.values()
    theirs, ours = load(dst), gp.load_compressed(dst)
    found = {name for name, module in ours.named_modules() if isinstance(module, SparseLinear)}
    assert found == set(made.layers)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe, bound", [
    ("magnitude-2:4", 0.57), ("magnitude-0.5", 0.57), ("magnitude-2:4+int8-rtn", 0.35),
])  # fmt: skip
def test_sizes_and_quantized_folders(tmp_path, recipe, bound):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64,
                         dtype=torch.bfloat16)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    gp.compress(tmp_path / "src", tmp_path / "out", recipe)
    plain = gp.load_compressed(tmp_path / "out", dtype=torch.float32)
    made = gp.pack_sparse(tmp_path / "out")
    assert made.nbytes == (tmp_path / "out" / NAME).stat().st_size
    assert made.nbytes <= bound * made.dense_nbytes and len(made.layers) == 14
    ours = gp.load_compressed(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(m, SparseLinear) for m in ours.modules()) == 14
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    load(tmp_path / "out")(IDS)


def test_a_stale_or_damaged_file_is_refused(saved, tmp_path):
    dst = tmp_path / "out"
    gp.compress(saved("llama"), dst, "magnitude-2:4")
    with pytest.raises(gp.CheckpointError, match="no linear layer is pruned"):
        gp.pack_sparse(saved("llama"))
    assert not [f for f in saved("llama").iterdir() if f.name.startswith(".")]
    gp.pack_sparse(dst)
    assert len(read_sparse(dst)) == len(gp.pack_sparse(dst).layers)
    weights = load_file(dst / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.weight"] *= 1.5
    save_file(weights, dst / "model.safetensors", {"format": "pt"})
    with pytest.raises(gp.CheckpointError, match=f"holds another {name}"):
        gp.load_compressed(dst)
    content = (dst / NAME).read_bytes()
    (dst / NAME).write_bytes(content[:-100])
    with pytest.raises(gp.CheckpointError, match="truncated"):
        gp.load_compressed(dst)
