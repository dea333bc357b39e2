"""Plans against measured peaks, and against sums by hand."""

from pathlib import Path

import pytest
import torch

import genai_perf as gp
from genai_perf.bench.memory import FreshProcesses
from genai_perf.integrations.plan_compress import plan_compression
from genai_perf.integrations.plan_train import plan_training

BATCH, SEQLEN = 4, 256
WAYS = {
    "fp32": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"dtype": "bf16"},
    "autocast": {"autocast": True},
    "lora": {"lora_rank": 8},
    "lora and checkpointing": {"lora_rank": 8, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1408,
                         num_attention_heads=8, num_key_value_heads=4,
                         num_hidden_layers=4)  # fmt: skip
    folder = tmp_path_factory.mktemp("plan")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_peak_of_training_is_measured_within_a_tenth(src):
    preload = ["transformers.models.llama.modeling_llama", "genai_perf.integrations.plan_train"]
    with FreshProcesses(preload, path=[Path(__file__).parent]) as processes:
        for name, way in WAYS.items():
            options = {"dtype": "fp32", "gradient_checkpointing": False, "lora_rank": None,
                       "autocast": False, **way}  # fmt: skip
            sizes = {"src": str(src), "batch": BATCH, "seqlen": SEQLEN}
            measured = processes.run("plan_work:train", {**sizes, **options}).value
            planned = plan_training(src, batch=BATCH, seqlen=SEQLEN, **way).peak
            assert planned == pytest.approx(measured, rel=0.1), name


def test_the_textbook_row(src):
    plan = plan_training(src, batch=1, seqlen=16)
    count = plan.trained[0]
    assert plan.trained == (count, count)
    assert plan.gradients == 4 * count and plan.optimizer == 8 * count
    assert 0 <= plan.weights - 4 * count < 1000  # buffers of the rotary embedding
    small = plan_training(src, batch=1, seqlen=16, dtype="bf16", optimizer="adamw8bit", shards=8)
    assert small.gradients == 2 * count // 8
    assert small.optimizer == int(count * 2 * (1 + 4 / 256)) // 8
    assert small.gathered == 2 * 2 * (3 * 512 * 1408 + 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512)


def test_qlora_holds_the_frozen_layers_packed(src):
    lora = plan_training(src, batch=1, seqlen=16, lora_rank=4)
    qlora = plan_training(src, batch=1, seqlen=16, lora_rank=4, quantize="nf4")
    weights = 4 * (3 * 512 * 1408 + 2 * 512 * 512 + 2 * 512 * 256)
    assert lora.weights - qlora.weights == weights * 4 - weights // 2 - weights // 64 * 4


@pytest.mark.parametrize("recipe", ["int4-rtn", "int8-rtn", "nf4-rtn", "magnitude-2:4"])
def test_sizes_after_compression_are_exact(src, tmp_path, recipe):
    ids = torch.randint(0, 4096, (4, 64))
    plan = plan_compression(src, recipe, n_samples=4, max_seqlen=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **options: None)  # few tokens
        report = gp.compress(src, tmp_path / "out", recipe, calibration=ids)
    assert plan.nbytes_before == report.nbytes_before
    assert plan.nbytes_after == pytest.approx(report.nbytes_after, rel=0.002)


def test_what_calibration_holds(src):
    in_memory = plan_compression(src, "int4-gptq", n_samples=64, max_seqlen=512)
    on_disk = plan_compression(src, "int4-gptq", n_samples=64, max_seqlen=512, activations="disk")
    inputs = 64 * 512 * 512 * 4
    assert in_memory.memory - on_disk.memory == inputs == on_disk.disk - in_memory.disk
    # q, k and v share their input, and gate and up theirs.
    assert in_memory.parts["hessians"] == 4 * (3 * 512**2 + 1408**2)
    assert plan_compression(src, "int4-rtn").parts["layer inputs"] == 0


def test_comparing_with_the_original_is_counted(tmp_path):
    """A large vocabulary, so that the logits are most of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=60_000, hidden_size=64, intermediate_size=128,
                         num_attention_heads=4, num_hidden_layers=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    preload = ["genai_perf.integrations.pipeline", "transformers.models.llama.modeling_llama"]
    with FreshProcesses(preload, path=[Path(__file__).parent]) as processes:
        folders = {"src": str(tmp_path / "src"), "dst": str(tmp_path / "dst")}
        usage = processes.run("memory_work:held_out", folders)
    plan = plan_compression(tmp_path / "src", "int8-rtn", n_heldout=4)
    without = plan_compression(tmp_path / "src", "int8-rtn")
    assert "held-out logits" in plan.parts and "held-out logits" not in without.parts
    measured = usage.peak_rss_bytes - usage.baseline_rss_bytes
    alive = plan.memory - plan.parts["kept by the allocator"]
    assert 0.9 * alive < measured < 1.1 * plan.memory


def test_bad_settings_are_one_sentence(src, tmp_path):
    for words, options in (
        ("'fp64'", {"dtype": "fp64"}),
        ("'adam'", {"optimizer": "adam"}),
        ("shards", {"shards": 0}),
        ("used with lora_rank", {"quantize": "nf4"}),
        ("fp32 with autocast", {"autocast": True, "dtype": "bf16"}),
    ):
        with pytest.raises(ValueError, match=words):
            plan_training(src, **options)
    with pytest.raises(gp.CheckpointError, match="does not exist"):
        plan_training(tmp_path / "nowhere")


def test_the_command(src):
    from typer.testing import CliRunner

    from genai_perf.cli import app

    done = CliRunner().invoke(app, ["plan", str(src), "--recipe", "int4-gptq"])
    assert done.exit_code == 0 and "peak memory" in done.output and "hessians" in done.output
    done = CliRunner().invoke(app, ["plan", str(src), "--train", "--seqlen", "32", "--lora", "4"])
    assert done.exit_code == 0 and "optimizer states" in done.output
    done = CliRunner().invoke(app, ["plan", str(src)])
    assert done.exit_code == 2 and "give --recipe" in done.output
