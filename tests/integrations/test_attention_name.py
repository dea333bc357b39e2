"""attn_implementation="genai_perf" against eager: logits, gradients, generated tokens."""

import copy

import pytest
import torch
from tiny_models import SIZES, configs

import genai_perf.integrations.transformers  # noqa: F401  (registers the name)
from genai_perf.integrations import attention

GROUPED = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


def more_configs() -> dict[str, tuple]:
    import transformers as t

    known = configs()
    names = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2")
    small = {"num_hidden_layers": 2}
    found = {name: (known[name][0], {**known[name][1], **small}) for name in names}
    found["gpt2"][1].pop("num_hidden_layers")
    return found | {
        "gemma2": (t.Gemma2Config, {**GROUPED, **LAYERS, "head_dim": 16, "sliding_window": 4,
                                    "attn_logit_softcapping": 2.0}),
        "gemma3": (t.Gemma3TextConfig, {**GROUPED, **LAYERS, "head_dim": 16, "sliding_window": 4}),
        "gpt-oss": (t.GptOssConfig, {**GROUPED, **LAYERS, "head_dim": 16, "sliding_window": 4,
                                     "num_local_experts": 2, "num_experts_per_tok": 1}),
        "bert": (t.BertConfig, {**SIZES, **small, "attention_probs_dropout_prob": 0.0}),
        "t5": (t.T5Config, dict(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2,
                                num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)),
        "bart": (t.BartConfig, dict(vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2,
                                    encoder_attention_heads=4, decoder_attention_heads=4,
                                    encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0,
                                    max_position_embeddings=64, forced_eos_token_id=None)),
    }  # fmt: skip


CONFIGS = more_configs()
TWO_SIDED = ("t5", "bart")
DECODERS = [name for name in CONFIGS if name not in ("bert", *TWO_SIDED)]


@pytest.fixture(scope="module")
def models():
    """pair(family, dtype) -> the same random model with eager attention, and with ours."""
    made = {}

    def pair(family: str, dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = build(family, dtype)
        return made[family, dtype]

    return pair


def build(family: str, dtype):
    import transformers as t

    torch.manual_seed(0)
    kind, arguments = CONFIGS[family]
    config = kind(**arguments)
    if family == "bert":
        make = t.BertForMaskedLM._from_config
    elif family in TWO_SIDED:
        make = t.AutoModelForSeq2SeqLM.from_config
    else:
        make = t.AutoModelForCausalLM.from_config
    experts = {"experts_implementation": "eager"} if family == "gpt-oss" else {}
    eager = make(config, attn_implementation="eager", **experts)
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    eager.to(dtype).eval()
    ours = make(copy.deepcopy(config), attn_implementation="genai_perf", **experts)
    ours.to(dtype).eval()
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "genai_perf"
    return eager, ours


def batch(family: str, padding: str | None = None) -> tuple[dict, torch.Tensor]:
    """Inputs, and which positions of the logits count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (3, 13), generator=generator)
    attention_mask = torch.ones_like(ids)
    if padding == "left":
        attention_mask[1, :5] = attention_mask[2, :1] = 0
    elif padding == "right":
        attention_mask[1, 8:] = attention_mask[2, 12:] = 0
    elif padding == "holes":
        attention_mask[1, 3:5] = attention_mask[2, ::3] = 0
    inputs = {"input_ids": ids, "attention_mask": attention_mask}
    if family in TWO_SIDED:
        inputs["decoder_input_ids"] = torch.randint(3, 96, (3, 9), generator=generator)
        return inputs, torch.ones(3, 9, dtype=torch.bool)
    return inputs, attention_mask.bool()


@pytest.fixture(autouse=True)
def float64_softmax(monkeypatch):
    """Eager attention softmaxes in float32, also in a float64 model, which is the judge here."""
    plain = torch.nn.functional.softmax

    def softmax(x, dim=None, dtype=None):
        return plain(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def run(model, inputs, counted, gradients: bool) -> dict:
    model.zero_grad()
    with torch.set_grad_enabled(gradients):
        logits = model(**inputs, use_cache=False).logits[counted]
    found = {"logits": logits.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(2)
        wanted = torch.randint(3, 96, (len(logits),), generator=generator)
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def check(models, family, inputs, counted, gradients=True) -> None:
    """float64 to the last digits; float32, by the kernels, as close to it as eager float32."""
    exact = run(models(family, torch.float64)[0], inputs, counted, gradients)
    same = run(models(family, torch.float64)[1], inputs, counted, gradients)
    eager, ours = (run(model, inputs, counted, gradients) for model in models(family))
    assert exact.keys() == same.keys() == ours.keys() and len(exact) > 3 * gradients
    for name, want in exact.items():
        size = want.abs().max()
        assert (same[name] - want).abs().max() <= 1e-11 * size + 1e-13, name
        bound = 4 * (eager[name] - want).abs().max() + 3e-6 * size + 1e-7
        assert (ours[name] - want).abs().max() <= bound, name


@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients(models, family, padding):
    check(models, family, *batch(family, padding), gradients=padding in (None, "left"))


@pytest.mark.parametrize("family", [name for name in DECODERS if name != "gpt-oss"])
def test_packed_sequences(models, family):
    ids = batch(family)[0]["input_ids"][:2]
    position_ids = torch.tensor([[*range(6), *range(4), *range(3)], [*range(12), 0]])
    counted = torch.ones_like(ids, dtype=torch.bool)
    check(models, family, {"input_ids": ids, "position_ids": position_ids}, counted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss"])
def test_packed_sequences_by_lengths(models, family):
    """cu_seq_lens beside position_ids that say the same, which GPT-OSS tells no mask of."""
    _, ours = models(family)
    ids = batch(family)[0]["input_ids"][:1]
    cut = torch.tensor([0, 6, 10, 13], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cut, "cu_seq_lens_k": cut, "max_length_q": 6, "max_length_k": 6}
    position_ids = torch.tensor([[*range(6), *range(4), *range(3)]])
    with torch.no_grad():
        want = ours(ids, position_ids=position_ids, use_cache=False).logits
        both = ours(ids, position_ids=position_ids, use_cache=False, **lengths).logits
        assert torch.equal(both, want)
        alone = torch.cat(
            [ours(ids[:, a:b], use_cache=False).logits for a, b in zip(cut, cut[1:], strict=False)],
            dim=1,
        )
        torch.testing.assert_close(alone, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_in_two_parts(models, family):
    """The second part sees the first one in the cache; with padding on the left."""
    eager, ours = models(family)
    inputs, _ = batch(family, "left")
    ids, attention_mask = inputs.values()
    logits = []
    with torch.no_grad():
        for model in (eager, ours):
            first = model(ids[:, :8], attention_mask=attention_mask[:, :8], use_cache=True)
            past = first.past_key_values
            logits.append(
                model(ids[:, 8:], attention_mask=attention_mask, past_key_values=past).logits
            )
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", [*DECODERS, *TWO_SIDED])
def test_generate(models, family, cache):
    inputs, _ = batch(family, "left")
    inputs.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None,
                   cache_implementation=cache, disable_compile=True)  # fmt: skip
    eager, ours = models(family)
    want = eager.generate(**inputs, **options)
    assert torch.equal(ours.generate(**inputs, **options), want)
    assert len(set(want.flatten().tolist())) > 1


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_a_token_goes_straight_to_the_kernel(models, family, monkeypatch):
    """Without padding nothing lies between transformers and the kernel, and logits stay eager's;
    under autocast or with a gradient it is the long way."""
    taken, plain = [], attention.direct
    monkeypatch.setattr(
        attention, "direct", lambda *a, **k: taken.append(plain(*a, **k)) or taken[-1]
    )
    eager, ours = models(family)
    ids = torch.randint(1, 90, (2, 5))

    def last(model, **inputs):
        with torch.no_grad():
            past = model(ids[:, :4], use_cache=True).past_key_values
            return model(ids[:, 4:], past_key_values=past, **inputs).logits

    torch.testing.assert_close(last(ours), last(eager), atol=1e-5, rtol=1e-5)
    assert taken and all(taken)
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        last(ours)
    assert not taken
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(
        last(ours, attention_mask=mask), last(eager, attention_mask=mask), atol=1e-5, rtol=1e-5
    )
    taken.clear()
    ours(ids[:, :1])
    assert taken and not any(taken)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss", "qwen3"])
def test_no_matrix_of_a_common_mask_is_ever_made(models, family, monkeypatch):
    """Padding, windows and packed sequences, in prompt and training: rules suffice."""
    from transformers import masking_utils

    _, ours = models(family)

    def refuse(*args, **kwargs):
        raise AssertionError("a matrix of bools was asked for")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    position_ids = torch.tensor([[*range(6), *range(7)]])
    for padding in (None, "left", "right"):
        run(ours, *batch(family, padding), gradients=True)
    packed = {"input_ids": batch(family)[0]["input_ids"][:1], "position_ids": position_ids}
    run(ours, packed, torch.ones(1, 13, dtype=torch.bool), gradients=True)


def test_compiled_in_one_graph(models):
    _, ours = models("mistral")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for padding in ("left", None):
        inputs, counted = batch("mistral", padding)
        with torch.no_grad():
            want = ours(**inputs, use_cache=False).logits[counted]
            got = compiled(**inputs, use_cache=False).logits[counted]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_made_again_in_the_backward(models, reentrant):
    _, ours = models("mistral")
    inputs, counted = batch("mistral", "left")
    ours.train()
    want = run(ours, inputs, counted, gradients=True)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = run(ours, inputs, counted, gradients=True)
    ours.gradient_checkpointing_disable()
    ours.eval()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-5)


def test_under_autocast(models):
    eager, ours = models("gemma2")
    inputs, counted = batch("gemma2", "left")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = (model(**inputs, use_cache=False).logits[counted] for model in (eager, ours))
    assert got.dtype == want.dtype
    assert (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dropout_while_training(models, family):
    _, ours = models(family)
    inputs, counted = batch(family, "left")
    ours.train()
    for name, module in ours.named_modules():  # of attention alone
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5 if name.endswith("attention.self.dropout") else 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run(ours, inputs, counted, gradients=True))
    same = [torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True)]
    assert all(same)
    assert not torch.equal(found[0]["logits"], found[2]["logits"])
    for module in ours.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    ours.eval()
