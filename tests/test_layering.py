"""The house rules that can be read from the source: who imports whom, what is never written."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "genai_perf"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import modules of its own layer or of a lower one.
LAYERS = [
    {"_version", "_errors", "_config", "_checks", "formats"},
    {"_backends", "_dispatch"},
    {"ops"},
    {"nn", "models", "flash_attn", "optim"},
    {"compression", "io", "distill", "neuron"},
    {"integrations"},
    {"bench", "testing"},
    {"cli", "__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Heavy or foreign libraries, and the only places that may import them, there too only when called.
FOREIGN = {
    "transformers": {"integrations"},
    "accelerate": {"integrations"},
    "peft": {"integrations", "bench"},  # in bench a peer
    "bitsandbytes": {"bench"},  # bench/peers, where they are measured
    "compressed_tensors": {"bench"},
    "matplotlib": {"bench"},
    "jinja2": {"bench"},
    "triton": {"ops", "_backends", "compression"},
    "nki": {"_backends"},
    "scipy": set(),
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part(path: Path) -> str:
    """The top-level room a file stands in: `ops` for genai_perf/ops/attention/api.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path):
    """(absolute module name, statement) for every import of the file, relative ones resolved."""
    package = ("genai_perf", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module or "", node
                continue
            base = package[: len(package) - node.level + 1]
            module = ".".join((*base, node.module) if node.module else base)
            if node.module:
                yield module, node
            else:
                for alias in node.names:
                    yield f"{module}.{alias.name}", node


def ids(paths):
    return [str(p.relative_to(PACKAGE)) for p in paths]


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_imports_run_one_way(path):
    for module, node in imports(path):
        names = module.split(".")
        if names[0] != "genai_perf" or len(names) < 2 or part(path) == "__init__":
            continue
        target = names[1]
        assert target in LEVEL or target == "_C", f"line {node.lineno}: {module} is in no layer"
        if target != "_C":
            assert LEVEL[target] <= LEVEL[part(path)], f"line {node.lineno}: imports {module}"


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_foreign_libraries_stay_in_their_rooms(path):
    top_level = parse(path).body
    for module, node in imports(path):
        name = module.split(".")[0]
        if name in FOREIGN:
            assert part(path) in FOREIGN[name], f"line {node.lineno}: imports {name}"
            assert node not in top_level or name == "triton", f"line {node.lineno}: {name} not lazy"


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_backends_of_an_op_do_not_import_each_other(path):
    relative = path.relative_to(PACKAGE).parts
    if relative[0] != "ops" or len(relative) < 3:
        return
    backends = {"native", "triton", "cuda", "nki"}
    if Path(relative[2]).stem in backends:
        for module, node in imports(path):
            if module.startswith(f"genai_perf.ops.{relative[1]}."):
                other = module.split(".")[3]
                own = Path(relative[2]).stem
                assert other not in (backends | {"api"}) - {own}, f"line {node.lineno}: {module}"


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_house_rules(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            names = (
                [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)]
                if node.type
                else [""]
            )
            assert not {"", "Exception"} & set(names), f"line {node.lineno}: except {names}"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert path.name == "_config.py", f"line {node.lineno}: environment read here"
        if isinstance(node, ast.Global):
            raise AssertionError(f"line {node.lineno}: global {node.names}")
        if isinstance(node, ast.Assert):
            raise AssertionError(f"line {node.lineno}: assert is stripped by -O; raise ValueError")


def test_public_functions_take_no_kwargs():
    import inspect

    import genai_perf as gp

    for name in gp.__all__:
        value = getattr(gp, name)
        if inspect.isfunction(value) and name != "explain":  # explain passes them on to its op
            kinds = [p.kind for p in inspect.signature(value).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_file_sizes():
    sources = [*FILES, *(ROOT / "csrc").rglob("*.[ch]*"), *(ROOT / "tests").rglob("*.py")]
    long = {
        str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 800
    }
    assert not long
