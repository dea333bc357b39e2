"""genaiperf convert, validate and pack-sparse."""

import torch
from typer.testing import CliRunner

from genai_perf import formats
from genai_perf.cli import app
from genai_perf.io import Checkpoint, ShardWriter, compressed_tensors
from genai_perf.io.sparse_file import read_sparse


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


def test_pack_sparse_says_what_it_packed_and_what_not(tmp_path):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    pruned = weight * (torch.arange(128) % 2)
    with ShardWriter(tmp_path / "a") as writer:
        writer.write({"l.q.weight": pruned, "l.k.weight": weight,
                      "l.experts.down_proj": pruned[None]})  # fmt: skip
        writer.commit({})
    done = run("pack-sparse", tmp_path / "a")
    assert done.exit_code == 0 and "1 layers in" in done.output
    assert "skipped l.k: 0% of it is zero" in done.output
    assert "skipped l.experts.down_proj: experts in one stack" in done.output
    assert list(read_sparse(tmp_path / "a")) == ["l.q"]
    assert run("pack-sparse", tmp_path / "a", "--layout", "bitmask").exit_code == 0
    assert read_sparse(tmp_path / "a")["l.q"].layout == "bitmask"


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    source = folder(tmp_path / "a")
    for arguments, word in (
        (("convert", source, tmp_path / "b", "--to", "awq"), "awq"),
        (("convert", source, source, "--to", "dense"), "exists"),
        (("convert", tmp_path / "none", tmp_path / "b", "--to", "gptq"), "does not exist"),
        (("validate", source, "--target", "sglang"), "sglang"),
        (("validate", source, "--tp", "0"), "tp must be positive"),
        (("pack-sparse", tmp_path / "none"), "does not exist"),
        (("pack-sparse", source), "no linear layer is pruned"),
        (("pack-sparse", source, "--layout", "4:8"), "layout must be one of"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert word in done.output and "Traceback" not in done.output
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]
