"""One rank of training under FSDP2; test_optimizers.py starts two of them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from test_optimizers import small, train  # noqa: E402

from genai_perf.optim import AdamW8bit  # noqa: E402


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = fully_shard(small(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    train(model, optimizer, 5)
    held = [optimizer.state[p]["exp_avg"].numel() for p in model.parameters()]
    full = [p.full_tensor() for p in model.parameters()]
    torch.save((held, full), folder / f"{rank}.pt")
    dist.barrier()  # gloo's thread lets go of its tensors, for which it needs the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
