"""Peak memory and time per block of compressing a large synthetic Llama (random bf16 weights).

    python benchmarks/compress_memory.py FOLDER [--gigabytes 8] [--blocks 32] [--recipe int4-rtn]

FOLDER gets the checkpoint and, for as long as it runs, the compressed copy: one and a half times
the size in free space. A run that was stopped goes on from its last finished block, and its figures
with it.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

HEAD, RATIO, VOCAB = 128, 2.75, 4096


def config(gigabytes: float, blocks: int):
    """A Llama with grouped queries whose blocks have the asked size together."""
    from transformers import LlamaConfig

    # 2 bytes x (hidden^2 x (q and o, k and v of a quarter) + hidden x three of the feed-forward)
    numbers = gigabytes * 1e9 / blocks / 2
    hidden = max(1, round((numbers / (2.5 + 3 * RATIO)) ** 0.5 / 512)) * 512
    heads = hidden // HEAD
    inner = max(HEAD, round((numbers / hidden - 2.5 * hidden) / 3 / HEAD) * HEAD)
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=heads // 4, num_hidden_layers=blocks,
        max_position_embeddings=2048, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip


def make(folder: Path, gigabytes: float, blocks: int) -> int:
    """Writes the checkpoint tensor by tensor; returns its bytes."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    from genai_perf.io import ShardWriter

    shape = config(gigabytes, blocks)
    with init_empty_weights():
        model = LlamaForCausalLM(shape)
    total = 0
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, max_shard_size="2GB") as writer:
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1
            value = torch.ones(parameter.shape) if norm else torch.empty(parameter.shape)
            value = value if norm else value.normal_(0, 0.02, generator=generator)
            writer.write({name: value.to(torch.bfloat16)})
            total += 2 * value.numel()
        writer.commit(shape.to_dict())
    return total


def child(src: str, dst: str, recipe: str, windows: int, log: str) -> None:
    """Compresses; writes the number, seconds and peak resident bytes so far of each block that it
    computes to a file."""
    import genai_perf as gp

    warnings.simplefilter("ignore")  # few tokens
    before = None  # (block, when it began)

    def progress(done, total, what):
        nonlocal before
        now = time.perf_counter(), time.process_time()
        if what == "embedding":
            return
        if before is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            wall, cpu = (b - a for a, b in zip(before[1], now, strict=True))
            entry = {"block": before[0], "seconds": wall, "cpu": cpu, "peak": peak}
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        before = done, now

    chosen = gp.Recipe.of(recipe)
    ids = None
    if chosen.needs_calibration:
        ids = torch.randint(0, VOCAB, (windows, 512), generator=torch.Generator().manual_seed(0))
    gp.compress(src, dst, chosen, calibration=ids, progress=progress)


def summary(recipe: str, log: Path) -> str:
    """The first time of each block counts: a later one only reads it back."""
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    blocks: dict[int, dict] = {}
    for entry in entries:
        blocks.setdefault(entry["block"], entry)
    quarter = max(1, len(blocks) // 4)
    ordered = [blocks[block] for block in sorted(blocks)]

    def medians(key: str) -> str:
        parts = (ordered[:quarter], ordered[-quarter:])
        first, last = (statistics.median(one[key] for one in part) for part in parts)
        return f"{first:.2f} s in the first quarter, {last:.2f} s in the last"

    peak = max(entry["peak"] for entry in entries)
    return (f"{recipe}: {len(ordered)} blocks, peak resident {peak / 1e9:.2f} GB; a block takes "
            f"{medians('seconds')}; CPU time {medians('cpu')}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--recipe", nargs="+", default=["int4-rtn", "int4-gptq"])
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    a = parser.parse_args()
    src = a.folder / "src"
    if not src.exists():
        make(src, a.gigabytes, a.blocks)
    nbytes = sum(file.stat().st_size for file in src.glob("*.safetensors"))
    print(f"{nbytes / 1e9:.2f} GB, {a.blocks} blocks, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for recipe in a.recipe:
        dst, log = a.folder / recipe, a.folder / f"{recipe}.jsonl"
        call = [sys.executable, __file__, "--child", str(src), str(dst), recipe, str(a.windows),
                str(log)]  # fmt: skip
        subprocess.run(call, check=True)
        print(summary(recipe, log))
        shutil.rmtree(dst)
        log.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6])
    else:
        main()
