"""One rank of a step over FSDP2 with quantized layers; test_sharding.py starts two of them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from test_sharding import CONFIGS, Net, step  # noqa: E402

from genai_perf.nn import QuantizedWeight, quantize_model, shardable  # noqa: E402


def main(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, config in CONFIGS.items():
        model = shardable(quantize_model(Net(), config, skip=("adapter",)))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        weights = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
        nbytes = sum(p.to_local().nbytes for w in weights for p in w.parameters())
        x = torch.load(folder / "x.pt")[rank]
        for _ in range(2):
            y, grads = step(model, x)
        shards = {n: p.to_local() for n, p in weights[0].named_parameters()}
        found[name] = {"y": y, "grads": {n: g.full_tensor() for n, g in grads.items()},
                       "nbytes": nbytes, "shards": shards}  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
