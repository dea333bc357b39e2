"""Errors, exit codes and the shape of the command line, without a model."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import genai_perf
from genai_perf.cli import app
from genai_perf.cli.console import need, user_errors


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def test_help_lists_the_commands():
    done = run("--help")
    assert done.exit_code == 0
    for name in ("demo", "compress", "doctor"):
        assert name in done.output


def test_version():
    assert run("--version").output == f"genaiperf {genai_perf.__version__}\n"


@pytest.mark.parametrize("words", [["no-such"], ["demo", "--no-such"], ["compress", "only-one"]])
def test_wrong_usage_is_exit_code_2(words):
    assert run(*words).exit_code == 2


@pytest.mark.parametrize("module", ["genai_perf", "genai_perf.cli"])
def test_python_m_imports_no_torch_for_help(module):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['genaiperf', '--help']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def ends(error: BaseException, capsys) -> tuple[int, str]:
    with pytest.raises(typer.Exit) as end, user_errors():
        raise error
    return end.value.exit_code, capsys.readouterr().err


def test_bad_input_is_one_sentence_and_code_2(capsys):
    from genai_perf import CheckpointError

    code, said = ends(CheckpointError("model.safetensors:\n  is [cut] short"), capsys)
    assert (code, said) == (2, "error: model.safetensors: is [cut] short\n")
    assert ends(FileNotFoundError(2, "No such file", "x.txt"), capsys)[0] == 2


def test_an_interrupt_is_code_130(capsys):
    assert ends(KeyboardInterrupt(), capsys)[0] == 130


def test_bugs_are_shown():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


def test_a_missing_extra_is_named():
    with pytest.raises(
        ValueError, match=r"no_such_module not installed; run `pip install 'genaiperf\[demo\]'`"
    ):
        need("demo", "json", "no_such_module")
