"""One of two gloo processes that train the same model on different halves of a batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlora


def make_model() -> nn.Module:
    """The same adapted model, and the same random state after it, in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    config = fastlora.LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    return fastlora.apply_lora(model, config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model, x = make_model(), torch.randn(8, 12)
    ddp = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        ddp(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    if rank == 0:
        fastlora.save_adapter(ddp, f"{folder}/adapter")
    del ddp  # it holds the group, whose threads must end before the process does
    dist.barrier()
    dist.destroy_process_group()
