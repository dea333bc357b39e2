"""One rank of a distributed step; test_fused_linear.py starts two of them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from test_fused_linear import Student  # noqa: E402


def main(how: str, rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=2)
    saved = torch.load(folder / "in.pt")
    ids, th, tw, labels = saved["inputs"]
    at = slice(2 * rank, 2 * rank + 2)
    model = Student(tied=True, bias=True)
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    # The ranks' gradients are averaged, so each is divided by its share of the tokens of all.
    loss = wrapped(ids[at], th[at], tw, labels[at], saved["items"] / 2)
    loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    torch.save(grads, folder / f"{rank}.pt")
    dist.barrier()  # gloo's thread lets go of its tensors, for which it needs the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
