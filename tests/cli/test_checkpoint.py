"""genaiperf convert and genaiperf validate."""

import torch
from typer.testing import CliRunner

from genai_perf import formats
from genai_perf.cli import app
from genai_perf.io import Checkpoint, ShardWriter, compressed_tensors


def folder(path):
    torch.manual_seed(0)
    qt = formats.get("int8").quantize(torch.randn(64, 128))
    config = compressed_tensors.quantization_config({"l.q": compressed_tensors.scheme(qt)}, [])
    with ShardWriter(path) as writer:
        writer.write(compressed_tensors.encode("l.q", qt))
        writer.commit({"quantization_config": config})
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_convert_then_validate(tmp_path):
    source = folder(tmp_path / "a")
    before = run("validate", source, "--target", "vllm")
    assert before.exit_code == 1 and "int-quantized without input_activations" in before.output
    done = run("convert", source, tmp_path / "b", "--to", "compressed-tensors",
               "--int8", "pack-quantized")  # fmt: skip
    assert done.exit_code == 0 and str(tmp_path / "b") in done.output
    assert Checkpoint(tmp_path / "b").quantization["format"] == "pack-quantized"
    after = run("validate", tmp_path / "b", "--target", "vllm")
    assert (
        after.exit_code == 0
        and "1 quantized layers for vllm, tensor parallel 1: ok" in after.output
    )


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    source = folder(tmp_path / "a")
    for arguments, word in (
        (("convert", source, tmp_path / "b", "--to", "awq"), "awq"),
        (("convert", source, source, "--to", "dense"), "exists"),
        (("convert", tmp_path / "none", tmp_path / "b", "--to", "gptq"), "does not exist"),
        (("validate", source, "--target", "sglang"), "sglang"),
        (("validate", source, "--tp", "0"), "tp must be positive"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert word in done.output and "Traceback" not in done.output
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]
