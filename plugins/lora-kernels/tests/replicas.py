"""What each of two processes does: gradients with and without the plugin, replicated by DDP and sharded by FSDP2.

The first one prints a line for each comparison; the test that starts both reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from adapted_models import adapted, patch
from pegbox.testing.tiny import tiny_batches
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


class Forward(nn.Module):
    """What is placed: the compute of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network, self._compute = model.module, model.compute

    def forward(self, batch: Any) -> torch.Tensor:
        return self._compute(self.network, batch, frozenset({"logps"})).logps_N


def gradients(patched: bool, placement: str) -> dict[str, torch.Tensor]:
    """Of one step: adapted, patched, and placed, in this order."""
    model = adapted()
    if patched:
        patch(model)
    forward: nn.Module = Forward(model)
    if placement == "ddp":
        forward = DistributedDataParallel(forward)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        reduced = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if placement == "fsdp bf16" else {}
        policy = MixedPrecisionPolicy(**reduced)
        for layer in model.module.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model.module, mesh=mesh, mp_policy=policy)
    batch = tiny_batches()[dist.get_rank()]
    (-forward(batch).float().mean()).backward()
    found = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> bool:
    if found.keys() != expected.keys():
        return False
    distances = [(found[name] - gradient).norm() / gradient.norm() for name, gradient in expected.items()]
    return max(distances).item() <= relative


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for placement, relative in (("ddp", 1e-4), ("fsdp", 1e-4), ("fsdp bf16", 0.05)):
        same = near(gradients(True, placement), gradients(False, placement), relative)
        agreed = torch.tensor(float(same))
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if dist.get_rank() == 0:
            print(f"{'equal' if agreed else 'different'}: {placement}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
