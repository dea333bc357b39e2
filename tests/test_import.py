"""What `import genai_perf` costs and what it must not pull in."""

import subprocess
import sys

import pytest

import genai_perf as gp


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_is_light():
    out = run("import sys, genai_perf; print(sorted(m for m in sys.modules if '.' not in m))")
    for heavy in ("torch", "triton", "transformers", "matplotlib", "nki", "jinja2"):
        assert f"'{heavy}'" not in out


def test_ops_load_without_optional_packages():
    blocked = "triton transformers matplotlib jinja2 bitsandbytes compressed_tensors nki"
    out = run(
        "import sys\n"
        f"for name in {blocked!r}.split(): sys.modules[name] = None\n"
        "import torch, genai_perf as gp\n"
        "q = torch.randn(1, 5, 2, 8)\n"
        "print(gp.attention(q, q, q, causal=True).shape)\n"
        "w = gp.quantize(torch.randn(8, 64), 'nf4')\n"
        "print(gp.quant_matmul(torch.randn(2, 64), w).shape)\n"
    )
    assert out.split("\n")[:2] == ["torch.Size([1, 5, 2, 8])", "torch.Size([2, 8])"]


def test_every_export_resolves():
    for name in gp.__all__:
        assert getattr(gp, name) is not None
    assert set(gp.__all__) <= set(dir(gp))


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        gp.atention  # noqa: B018


def test_refuses_to_share_its_folder_with_the_other_genai_perf(tmp_path):
    """NVIDIA's retired client benchmark installs a package of the same import name."""
    from pathlib import Path

    package = Path(gp.__file__).parent
    info = tmp_path / "genai_perf-0.0.16.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: genai-perf\nVersion: 0.0.16\n")
    (info / "RECORD").write_text("genai_perf/__init__.py,,\n")
    link = tmp_path / "genai_perf"
    link.symlink_to(package)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import genai_perf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip uninstall genai-perf" in done.stderr
