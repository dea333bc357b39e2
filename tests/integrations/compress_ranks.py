"""One rank of a compression; test_distributed.py starts two of them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import genai_perf as gp


def main(rank: int, recipe: str, src: str, work: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/ranks", rank=rank, world_size=2)
    ids = torch.load(work / "ids.pt")
    report = gp.compress(src, work / "two", gp.Recipe.of(recipe), calibration=ids,
                         activations="disk" if rank else "memory")  # fmt: skip
    (work / f"{rank}.txt").write_text(f"{report.name} {report.error!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
