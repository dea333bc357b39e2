"""DistillationTrainer and what belongs to it, on models of a few thousand parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

import genai_perf as gp
from genai_perf.distill import (
    CacheDataset,
    DistillationSettings,
    TeacherProcess,
    WindowDataset,
    student_from_teacher,
)
from genai_perf.distill.cache import Identity, text_hash, write_cache
from genai_perf.integrations import heads
from genai_perf.integrations.distillation_trainer import LossAtHead, collate, rollout

transformers = pytest.importorskip("transformers")
WINDOWS = torch.randint(0, 96, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(3)
    return tiny_model("llama")


def arguments(folder, **options):
    values = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | options
    return transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
        logging_steps=1, lr_scheduler_type="constant", **values,
    )  # fmt: skip


def trainer(folder, student, teacher, settings=None, dataset=None, **options):
    return gp.distill.DistillationTrainer(
        student, arguments(folder, **options), teacher=teacher, settings=settings,
        train_dataset=dataset or WindowDataset(WINDOWS),
    )  # fmt: skip


def kept(teacher, k, temperature=1.0, windows=WINDOWS):
    return heads.top_k_of(teacher, windows, k, temperature=temperature, rows=7)


def make_cache(path, teacher, k=96):
    identity = Identity("t", "v", text_hash(WINDOWS), 96, k, 1.0, *WINDOWS.shape)
    return write_cache(path, WINDOWS, lambda ids: kept(teacher, k, windows=ids), identity)


def by_logits(student, teacher, inputs, alpha):
    """The same loss through the models' own logits."""
    ids = inputs["input_ids"]
    z, zt = (m(input_ids=ids).logits[:, :-1].flatten(0, 1) for m in (student, teacher))
    soft = F.kl_div(z.log_softmax(-1), zt.log_softmax(-1), log_target=True, reduction="batchmean")
    return (1 - alpha) * soft + alpha * F.cross_entropy(z, ids[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loss_at_the_head_is_that_of_the_logits(family):
    """Softcap and logit scale come from the config."""
    teacher, student = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    student.eval()
    batch = collate([WindowDataset(WINDOWS)[i] for i in range(4)])
    want = by_logits(student, teacher, batch, 0.25)
    loss, parts = LossAtHead(DistillationSettings(alpha=0.25), teacher)(student, student, batch)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    named = list(student.parameters())
    grads = [torch.autograd.grad(x, named, retain_graph=True) for x in (loss, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
    assert "forward" not in heads.head_of(student).__dict__
    assert student(input_ids=WINDOWS).logits.shape[-1] == 96


def test_training_moves_the_student_to_its_teacher(teacher, tmp_path):
    student = student_from_teacher(teacher, layers=2)
    run = trainer(tmp_path, student, teacher, max_steps=12)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    soft = [entry["loss_soft"] for entry in run.state.log_history if "loss_soft" in entry]
    assert soft == pytest.approx(losses, rel=1e-3)
    assert not any(p.grad is not None for p in teacher.parameters())


def test_gradient_accumulation_changes_nothing(teacher, tmp_path):
    """Batches with different numbers of labels, in one step of 4 or in 4 of one."""

    class Uneven(WindowDataset):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            example["labels"][1 : 1 + index % 12] = -100
            return example

    after = []
    for batch, accumulate in ((4, 1), (1, 4)):
        student = student_from_teacher(teacher, layers=2)
        trainer(tmp_path, student, teacher, DistillationSettings(alpha=0.5),
                Uneven(WINDOWS), max_steps=2, per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate, optim="sgd").train()  # fmt: skip
        after.append(student.state_dict())
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-6)


def test_cache_process_and_live_teacher_train_alike(teacher, tmp_path):
    """All of the vocabulary in the cache and the process: the same student, but for fp16."""
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
    tokenizer.save_pretrained(tmp_path / "teacher")
    cache = make_cache(tmp_path / "cache", teacher)
    after = []
    with TeacherProcess(tmp_path / "teacher", 96) as process:
        torch.testing.assert_close(process.top_k(WINDOWS).logprobs, kept(teacher, 96).logprobs)
        for source, data in ((teacher, None), (process, None), (cache, CacheDataset(cache))):
            student = student_from_teacher(teacher, layers=1)
            trainer(tmp_path, student, source, dataset=data, optim="sgd").train()
            after.append(student.state_dict())
        with pytest.raises(RuntimeError, match="TeacherProcess: "):
            process.top_k(torch.full((1, 4), 10_000))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[0], after[2], rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="TeacherProcess: .*is no checkpoint folder"):
        TeacherProcess(tmp_path, 4)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))


def test_on_policy_batches_are_the_students_own(teacher, tmp_path):
    settings = DistillationSettings(on_policy=1.0, prompt_tokens=5)
    batch = collate([WindowDataset(WINDOWS)[i] for i in range(3)])
    a, b = (rollout(teacher, batch, settings, seed=7) for _ in range(2))
    assert torch.equal(a["input_ids"], b["input_ids"])
    assert torch.equal(a["input_ids"][:, :5], WINDOWS[:3, :5])
    assert not torch.equal(a["input_ids"], WINDOWS[:3])
    assert (a["labels"][:, :5] == -100).all()
    assert torch.equal(a["labels"][:, 5:], a["input_ids"][:, 5:])
    student = student_from_teacher(teacher, layers=1)
    run = trainer(tmp_path, student, teacher, settings)
    run.train()
    assert len([entry for entry in run.state.log_history if "loss" in entry]) == 3
    with pytest.raises(ValueError, match="prompt_tokens must be below the 16 tokens"):
        rollout(teacher, batch, DistillationSettings(prompt_tokens=16), 0)
    cache = make_cache(tmp_path / "cache", teacher, 4)
    with pytest.raises(ValueError, match="on_policy must be 0 with a TeacherCache"):
        trainer(tmp_path, student, cache, settings)


def test_a_cache_of_another_text_is_noticed(teacher, tmp_path):
    cache = make_cache(tmp_path / "cache", teacher, 4)
    student = student_from_teacher(teacher, layers=1)
    with pytest.raises(ValueError, match="is the cache of another text than window"):
        trainer(tmp_path, student, cache, dataset=WindowDataset((WINDOWS + 1) % 96)).train()


def test_different_tokenizers_are_refused(teacher, tmp_path):
    ours = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
    theirs = copy.deepcopy(ours)
    theirs.add_tokens(["new"])
    with pytest.raises(
        ValueError, match=r"tokenizer \(96 tokens\) and the teacher's \(97 tokens\)"
    ):
        gp.distill.DistillationTrainer(
            student_from_teacher(teacher, layers=1), arguments(tmp_path), teacher=teacher,
            processing_class=ours, teacher_tokenizer=theirs,
        )  # fmt: skip
    cache = make_cache(tmp_path / "cache", teacher, 4)
    with pytest.raises(gp.CheckpointError, match="is the cache of another tokenizer"):
        gp.distill.DistillationTrainer(teacher, arguments(tmp_path), teacher=cache,
                                       processing_class=ours)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_students_are_models_that_load_again(family, tmp_path):
    teacher = tiny_model(family)
    student = student_from_teacher(teacher, layers=2, intermediate_size=40)
    assert student.config.num_hidden_layers == 2 and student.config.intermediate_size == 40
    student.save_pretrained(tmp_path / "student")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = WINDOWS[:2]
    torch.testing.assert_close(again(input_ids=ids).logits, student(input_ids=ids).logits)
    assert torch.isfinite(student.generate(ids[:, :4], max_new_tokens=3, do_sample=False)).all()
    assert teacher.config.num_hidden_layers == 3
    first, last = (student.model.layers[i].self_attn.q_proj.weight for i in (0, 1))
    assert torch.equal(first, teacher.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(last, teacher.model.layers[2].self_attn.q_proj.weight)
    whole = student_from_teacher(teacher)
    torch.testing.assert_close(whole(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_students_that_cannot_be(teacher):
    with pytest.raises(ValueError, match="layers must be from 1 to 3, got 4"):
        student_from_teacher(teacher, layers=4)
    with pytest.raises(ValueError, match="layers must be from 0 to 2, rising"):
        student_from_teacher(teacher, layers=[2, 0])
    with pytest.raises(ValueError, match="intermediate_size must be from 1 to 128, got 129"):
        student_from_teacher(teacher, intermediate_size=129)
    with pytest.raises(ValueError, match="needs one gated MLP"):
        student_from_teacher(tiny_model("gpt2"), intermediate_size=8)


def test_top_k_of_a_model_is_that_of_its_logits(teacher):
    got, z = kept(teacher, 5, 2.0), teacher(input_ids=WINDOWS).logits / 2.0
    values, ids = z.log_softmax(-1).topk(5)
    assert torch.equal(got.ids, ids)
    torch.testing.assert_close(got.logprobs, values)


def test_bad_settings(teacher, tmp_path):
    for options, message in (
        ({"kind": "kl"}, "kind must be one of"),
        ({"on_policy": 1.5}, "on_policy must be from 0 to 1"),
        ({"temperature": 0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match="DistillationSettings: " + message):
            DistillationSettings(**options)
    with pytest.raises(TypeError, match="teacher must be a model, a TeacherCache or have top_k"):
        trainer(tmp_path, teacher, "teacher")
    with pytest.raises(ValueError, match="the output embedding of Linear must be an nn.Linear"):
        heads.head_of(torch.nn.Linear(2, 2))
