"""Ways to train and whole models, on a model of a few thousand weights."""

import pytest
import torch

from genai_perf.bench import models, results, runner, training
from genai_perf.models import tiny_python_lm

WORK = training.Work(batch=4, micro=2, length=8, steps=2)
QUICK = runner.Settings(budget_seconds=0.05, quick=True, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2,
                         max_position_embeddings=64)  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "small"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def train(folder, name, **changes):
    work = {**training.asdict(WORK), **changes}
    threads, limit = torch.get_num_threads(), 1 << 40
    soft = training.resource.getrlimit(training.resource.RLIMIT_AS)
    try:
        return training.train(str(folder), name, "cpu", threads, limit, work)
    finally:
        training.resource.setrlimit(training.resource.RLIMIT_AS, soft)


@pytest.fixture
def no_limit(monkeypatch):
    """The limit is for a fresh process; here it would stay with the tests."""
    monkeypatch.setattr(training.resource, "setrlimit", lambda *args: None)


def test_accumulation_and_checkpointing_do_the_same_steps(folder, no_limit):
    """They change memory and time, not what is learned."""
    plain = train(folder, "plain")["loss"]
    for name in ("gradient accumulation", "gradient checkpointing", "accumulation + checkpointing",
                 "our attention"):  # fmt: skip
        assert train(folder, name)["loss"] == pytest.approx(plain, rel=1e-4), name


def test_lora_trains_few_parameters_and_starts_where_the_model_is(folder, no_limit):
    plain, lora = train(folder, "plain", lr=0.0), train(folder, "LoRA", lr=0.0)
    assert lora["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert lora["trained_parameters"] < plain["trained_parameters"] / 2
    assert train(folder, "LoRA", lr=0.1)["loss"] != lora["loss"]
    nf4 = train(folder, "QLoRA (nf4)", lr=0.0)["loss"]
    assert nf4 != lora["loss"] and nf4 == pytest.approx(lora["loss"], rel=0.05)


def test_a_table_of_ways(folder):
    report = training.run(folder, QUICK, work=WORK, ways=("plain", "LoRA", "Liger kernels"))
    results.validate(report)
    rows = {row["name"]: row for row in report["training"]}
    assert rows["plain"]["samples_per_s"] > 0 and rows["plain"]["peak_bytes"] > 1 << 20
    if not torch.cuda.is_available():
        assert rows["Liger kernels"]["status"] == "skipped"


def test_unknown_way_offers_the_nearest():
    with pytest.raises(ValueError, match="did you mean.*gradient accumulation"):
        training.run(tiny_python_lm(), QUICK, ways=("gradient acumulation",))


def test_a_model_before_and_after_patch(folder):
    report = models.run([folder], QUICK, batches=(1,), lengths=(16,))
    results.validate(report)
    plain, patched = report["models"]
    assert (plain["variant"], patched["variant"]) == ("small", "small, patched")
    for row in (plain, patched):
        assert row["status"] == "ok", row["reason"]
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["first_token_seconds"] == pytest.approx(16 / row["prefill_tokens_per_s"])
        assert row["train_step_seconds"] > 0 and row["mfu"] > 0 and row["peak_bytes"] > 1 << 20
        assert row["train_peak_bytes"] > 1 << 20 and row["train_reason"] is None
    assert plain["decode"] is None and patched["decode"]["baseline"] == "small"


def test_batches_double_until_memory_ends(monkeypatch):
    tries = []

    class Fresh:
        def run(self, target, arguments):
            if arguments["batch"] > (4 if arguments["work"] == "use" else 2):
                tries.append((arguments["work"], arguments["batch"]))
                raise RuntimeError(f"{target} failed: DefaultCPUAllocator: can't allocate memory")
            return type("Usage", (), {"value": {"peak": arguments["batch"]}})

    model = models._Model("m", tiny_python_lm(), False)
    settings = runner.Settings(threads=1)
    found = list(models._batches([model], 8, (), Fresh(), settings, 1 << 30))
    assert [batch for batch, _ in found] == [1, 2, 4, 8]
    assert found[-1][1]["m", "use"]["status"] == "out of memory"
    assert found[2][1]["m", "train"]["status"] == "out of memory"
    assert tries == [("train", 4), ("use", 8)]  # a training that did not fit is not tried larger


def test_training_flops_by_hand(folder):
    model = models.load(folder)
    weights = sum(p.numel() for p in model.parameters()) - 128 * 64  # the embedding is a look-up
    assert models.training_flops(model, 3, 8) == 3 * (6 * weights * 8 + 12 * 2 * 64 * 32)
