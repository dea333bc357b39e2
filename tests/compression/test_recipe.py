import json

import pytest

from genai_perf.compression import (
    GPTQ,
    RIA,
    RTN,
    Hadamard,
    Magnitude,
    Recipe,
    SmoothQuant,
    SparseGPT,
    Wanda,
)
from genai_perf.compression.recipe import NAMES


@pytest.mark.parametrize("name, steps", [
    ("int8-rtn", (RTN("int8"),)), ("fp8-rtn", (RTN("fp8"),)), ("nf4-rtn", (RTN("nf4"),)),
    ("int4-rtn", (RTN("int4"),)), ("int4-gptq", (GPTQ(),)),
    ("int8-gptq", (GPTQ(bits=8, group_size=-1),)), ("int3-gptq", (GPTQ(bits=3),)),
    ("sparsegpt-0.5", (SparseGPT(sparsity=0.5),)), ("sparsegpt-2:4", (SparseGPT(pattern="2:4"),)),
    ("sparsegpt-0.5+int4-gptq", (SparseGPT(sparsity=0.5), GPTQ())),
    ("sparsegpt-4:8-faithful", (SparseGPT(pattern="4:8", refine=None),)),
    ("sparsegpt-0.7-owl", (SparseGPT(sparsity=0.7, allocation="owl"),)),
    ("sparsegpt-0.7-faithful-owl", (SparseGPT(sparsity=0.7, refine=None, allocation="owl"),)),
    ("ria-0.5", (RIA(sparsity=0.5),)), ("ria-2:4+int4-gptq", (RIA(pattern="2:4"), GPTQ())),
    ("magnitude-0.5", (Magnitude(sparsity=0.5),)), ("wanda-2:4", (Wanda(pattern="2:4"),)),
    ("int4-rtn-mse", (RTN(search="mse"),)),
    ("nf4-gptq", (GPTQ(bits=4, group_size=64, grid="nf4"),)),
    ("hadamard+sparsegpt-0.5+fp8-gptq", (Hadamard(), SparseGPT(sparsity=0.5), GPTQ(grid="fp8"))),
    ("smoothquant+w8a8-mse", (SmoothQuant(), RTN("int8", search="mse", activations="int8"))),
    ("wanda-0.5+int8-rtn", (Wanda(sparsity=0.5), RTN("int8"))),
])  # fmt: skip
def test_names(name, steps):
    recipe = Recipe.named(name)
    assert recipe == Recipe(steps) == Recipe.of(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_listed_names_are_names():
    for name in NAMES:
        assert Recipe.named(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "int5-rtn",
        "int4-gptqq",
        "sparsegpt",
        "sparsegpt-0.5+",
        "",
        "wanda-0.5-faithful",
        "ria-2:4-alps",
    ],
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match="unknown name.*names: int8-rtn, "):
        Recipe.named(name)


def test_unknown_names_give_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'int4-gptq'"):
        Recipe.of("int4-gtpq")
    with pytest.raises(ValueError, match="unknown key 'sparcity'; did you mean 'sparsity'"):
        Recipe.of({"steps": [{"method": "sparsegpt", "sparcity": 0.5}]})
    with pytest.raises(ValueError, match="unknown key 'step'; did you mean 'steps'"):
        Recipe.of({"step": []})
    with pytest.raises(ValueError, match="unknown method 'sparse_gpt'; did you mean 'sparsegpt'"):
        Recipe.of({"steps": [{"method": "sparse_gpt"}]})


@pytest.mark.parametrize("make, words", [
    (lambda: Recipe.of("sparsegpt-1.5"), "sparsity must be at least 0 and below 1, got 1.5"),
    (lambda: Recipe.of("sparsegpt-4:2"), "pattern must be"),
    (lambda: Recipe.of("int4-gptq+sparsegpt-0.5"), "a pruner and then a .* got int4-gptq"),
    (lambda: Recipe.of("int4-gptq+int8-rtn"), "a pruner and then a quantizer"),
    (lambda: Recipe((SparseGPT(sparsity=0.5, refine=None), GPTQ(act_order=True))), "one sweep"),
    (lambda: Recipe.of("wanda-2:4-owl"), "allocation needs sparsity"),
    (lambda: Wanda(sparsity=0.5, allocation="alpha"), "allocation must be one of"),
    (lambda: SparseGPT(sparsity=0.5, search=-1), "search must be"),
    (lambda: RIA(sparsity=0.5, power=-1), "power must be"),
    (lambda: Recipe(()), "steps must be"),
    (lambda: Recipe((RTN("int8"),), skip=("re:(",)), "not a regular expression"),
    (lambda: Recipe.from_dict({"steps": "int8-rtn"}), "steps must be a list"),
    (lambda: Recipe.from_dict({"steps": ["int8-rtn"]}), "each step must be a mapping"),
    (lambda: Recipe.from_dict({"steps": [{"method": "gptq", "damp_frac": "a"}]}), "'gptq'"),
    (lambda: RTN("int5"), "format must be one of"),
    (lambda: RTN("int8", group_size=64), "group_size"),
    (lambda: GPTQ(bits=5), "bits must be"),
    (lambda: GPTQ(block_size=0), "block_size must be positive"),
    (lambda: GPTQ(grid="nf4", group_size=128), "4, 64, True with grid 'nf4', got 4, 128, True"),
    (lambda: GPTQ(grid="fp8", scales="sweep"), "grid='fp8' needs scales='static'"),
    (lambda: GPTQ(double_quant=True), "double_quant must be False"),
    (lambda: RTN("fp8", granularity="block", search="mse"), "search must be None"),
    (lambda: RTN("int4", activations="int8"), "activations must be None"),
    (lambda: Recipe.of("int4-rtn-imatrix"), "unknown name"),
    (lambda: SparseGPT(sparsity=0.5, damp_frac=-1), "damp_frac"),
    (lambda: SparseGPT(), "one of sparsity and pattern"),
])  # fmt: skip
def test_bad_recipes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_files(tmp_path):
    recipe = Recipe((SparseGPT(pattern="2:4"), RTN("nf4", double_quant=True)), skip=("down_proj",))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.of(file) == Recipe.of(str(file)) == recipe
    file = tmp_path / "recipe.yaml"
    text = "steps:\n- {method: sparsegpt, pattern: '2:4'}\n"
    text += "- {method: rtn, format: nf4, double_quant: true}\nskip: [down_proj]\n"
    file.write_text(text)
    assert Recipe.of(file) == recipe


@pytest.mark.parametrize("name, content, words", [
    ("a.yaml", b"steps: [", "cannot be parsed"),
    ("a.json", b"{", "cannot be parsed"),
    ("a.yaml", b"\xff\xfe\x00", "not UTF-8"),
    ("a.yaml", b"- 1", "must be a mapping"),
    ("a.yaml", b"steps: [{method: gptq, bit: 4}]", "a.yaml.*key 'bit'; did you mean 'bits'"),
    ("missing.yaml", None, "missing.yaml: No such file"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Recipe.of(tmp_path / name)


def test_skip():
    recipe = Recipe((RTN(),), skip=("lm_head", "model.layers.0.mlp.up_proj", r"re:.*\.3\."))
    assert recipe.skips("lm_head") and recipe.skips("model.lm_head")
    assert recipe.skips("model.layers.0.mlp.up_proj")
    assert not recipe.skips("model.layers.1.mlp.up_proj")
    assert recipe.skips("model.layers.3.mlp.up_proj")
    assert not recipe.skips("model.layers.13.mlp.up_proj")


def test_who_needs_calibration():
    need = {name for name in NAMES if Recipe.named(name).needs_calibration}
    free = {name for name in NAMES if "rtn" in name or "magnitude" in name}
    assert need == set(NAMES) - free | {"int4-rtn-importance", "awq+int4-rtn"}


MIXED = {
    "steps": [{"method": "gptq", "group_size": 32}],
    "rules": [
        {"layers": "re:.*layers.0.mlp", "steps": [{"method": "rtn", "format": "int8"}]},
        {"layers": "down_proj", "steps": [{"method": "rtn", "format": "fp8"}]},
    ],
}


def test_rules_choose_by_layer_and_survive_a_round_trip():
    recipe = Recipe.from_dict(MIXED)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    found = {
        name: recipe.for_layer(f"model.layers.{name}").quantizer.format
        for name in ("0.mlp.down_proj", "1.mlp.down_proj", "1.mlp.up_proj", "0.self_attn.q_proj")
    }
    assert list(found.values()) == ["int8", "fp8", "int4", "int4"]  # the first rule counts
    assert recipe.needs_calibration and recipe.name == "int4-gptq, mixed"
    needed = {"steps": [{"method": "rtn"}], "rules": [{"layers": "x", "steps": MIXED["steps"]}]}
    assert Recipe.from_dict(needed).needs_calibration


@pytest.mark.parametrize("rule, words", [
    ({"layer": "x", "steps": []}, "did you mean 'layers'"),
    ({"layers": 3, "steps": []}, "a name or 're:'"),
    ({"layers": "x"}, "a list of steps"),
    ({"layers": "x", "steps": []}, "one or two of"),
    ({"layers": "re:(", "steps": [{"method": "rtn"}]}, "not a regular expression"),
    ({"layers": "x", "steps": [{"method": "rtn", "format": "nf4"}]}, "cannot be in one checkpoint"),
])  # fmt: skip
def test_bad_rules_are_one_sentence(rule, words):
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict({"steps": [{"method": "rtn"}], "rules": [rule]})
