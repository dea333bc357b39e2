"""PEFT's LoRA on quantized layers."""

import copy

import pytest
import torch
from torch import nn

import genai_perf as gp
from genai_perf.models import stdlib_text, tiny_python_lm

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from genai_perf.integrations.peft import get_peft_model, support  # noqa: E402


def language_model(dtype=torch.float32):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(tiny_python_lm(), dtype=dtype)


def lora(**options):
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.fixture(scope="module")
def batches():
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_python_lm())
    text = "".join(source for _, source in stdlib_text("heldout")[:6])
    return torch.tensor(tokenizer(text)["input_ids"])[: 60 * 256].view(60, 2, 128)


def train(model, batches):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def adapted(format, seed=0):
    torch.manual_seed(seed)
    model = gp.quantize_model(language_model(), format)
    return get_peft_model(model, lora())


def test_qlora_learns_as_lora_does(batches):
    """The nf4 model under its adapters ends within 2 % of the 16-bit model under the same."""
    torch.manual_seed(0)
    dense = peft.get_peft_model(language_model(torch.bfloat16), lora())
    frozen = {p.dtype for p in dense.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    dense = train(dense, batches)
    model = adapted("nf4")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 4 and all("lora_" in name for name in trained)
    frozen = model.state_dict()
    frozen = {n: x.clone() for n, x in frozen.items() if "qdata" in n}
    quantized = train(model, batches)
    start = language_model()(input_ids=batches[-1], labels=batches[-1]).loss.item()
    assert dense < start and abs(quantized - dense) < 0.02 * dense
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in frozen.items())


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8"])
def test_merge_and_unmerge(format, batches):
    model, ids = adapted(format), batches[0]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    want = layer.base_layer.weight.tensor().dequantize() + layer.get_delta_weight("default")
    with model.disable_adapter():
        base = logits(model, ids)
    beside = logits(model, ids)
    model.merge_adapter(safe_merge=True)
    merged = logits(model, ids)
    assert torch.equal(layer.base_layer.weight.tensor().qdata, gp.quantize(want, format).qdata)
    step = {"int8": 0.1, "fp8": 0.3}.get(format, 1.0)
    assert (merged - beside).norm() < step * (beside - base).norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), beside)
    plain = copy.deepcopy(model).merge_and_unload()
    kinds = [type(m) for m in plain.modules() if isinstance(m, gp.QuantLinear)]
    assert len(kinds) == 28 and torch.equal(logits(plain, ids), merged)
    assert torch.equal(logits(model.unload(), ids), base)


def test_saved_adapters_load_again(tmp_path, batches):
    model, ids = adapted("nf4"), batches[0]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    model.save_pretrained(tmp_path)
    again = gp.quantize_model(language_model(), "nf4")
    config = support(peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(again, tmp_path, config=config)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_two_adapters_and_names_of_layers(batches):
    model = gp.quantize_model(language_model(), "int8")
    model = get_peft_model(model, lora(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", support(lora(target_modules=["q_proj"], r=4)))
    model.set_adapter("second")
    names = [n for n, m in model.named_modules() if hasattr(m, "lora_A") and "second" in m.lora_A]
    assert len(names) == 4
    assert torch.isfinite(logits(model, batches[0])).all()


def test_variants_are_refused():
    model = gp.quantize_model(language_model(), "nf4")
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(model, lora(use_dora=True))
