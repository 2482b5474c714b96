"""What each of two processes does: gradients with and without the plugin, replicated by DDP and sharded by FSDP2.

The first one prints a line for each comparison; the test that starts both reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from pegbox import hooks
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_batches, tiny_model
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"reentrant": True},
    {"offload": "cpu", "offload_min_bytes": 0},
    {"modules": r".*\.mlp"},
)


class Forward(nn.Module):
    """What is placed: the compute of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network, self._compute = model.module, model.compute

    def forward(self, batch: Any) -> torch.Tensor:
        return self._compute(self.network, batch, frozenset({"logps"})).logps_N


def gradients(settings: dict[str, Any] | None, placement: str, adapted: bool) -> dict[str, torch.Tensor]:
    """Of one step: patched, adapted, made to recompute, and placed, in this order."""
    model = tiny_model(attention_dropout=0.2)
    plugins = [*(["lora"] if adapted else []), "activations"]
    ctx = compose({"model": {"name": "tiny"}, "plugins": plugins, "activations": settings or {}})
    if adapted:
        model = ctx.call(hooks.apply_adapters, ctx, model)
    if settings is not None:
        PatchLog().apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    forward: nn.Module = Forward(model)
    if placement == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.module.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.module, mesh=mesh)
    else:
        forward = DistributedDataParallel(forward)
    torch.manual_seed(dist.get_rank())
    (-forward(tiny_batches()[dist.get_rank()]).mean()).backward()
    found = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for adapted in (False, True):
        expected = gradients(None, "ddp", adapted)
        for placement in ("ddp", "fsdp"):
            for settings in SETTINGS:
                got = gradients(settings, placement, adapted)
                same = got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
                agreed = torch.tensor(float(same))
                dist.all_reduce(agreed, dist.ReduceOp.MIN)
                if dist.get_rank() == 0:
                    what = "equal" if agreed else "different"
                    print(f"{what}: {placement}, adapted {adapted}, {settings}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
