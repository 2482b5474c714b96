"""What each of two processes does: the policy `auto`, where one has memory for all layers and the other for none.

The first one prints a line for each placement; the test that starts both reads them: whether the gradients are those
without the plugin, and how many layers each process keeps whole.
"""

from __future__ import annotations

from typing import Any

import torch
from pegbox import hooks
from pegbox.events import GradientsReady, Stepped
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import tiny_batches, tiny_model
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

MUCH, LITTLE, STEPS = 1.0, 1e-6, 4


class TwoProcesses(FakeRuntime):
    """A runtime that asks the other process."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def gather_objects(self, value: object) -> list[object]:
        gathered: list[object] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered


class Forward(nn.Module):
    """What is placed: the compute of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network, self._compute = model.module, model.compute

    def forward(self, batch: Any) -> torch.Tensor:
        return self._compute(self.network, batch, frozenset({"logps"})).logps_N


def gradients(placement: str, patched: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Of the last of some steps that change nothing, and how many layers this process keeps whole in it."""
    model = tiny_model(num_hidden_layers=4)
    budget = {"policy": "auto", "memory_gib": LITTLE if dist.get_rank() else MUCH}
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["activations"], "activations": budget})
    ctx.runtime = TwoProcesses()
    if patched:
        PatchLog().apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    forward: nn.Module = Forward(model)
    if placement == "ddp":
        forward = DistributedDataParallel(forward)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.module.model.layers:
            if placement == "parts of layers":
                fully_shard(layer.mlp, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model.module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=0.0, weight_decay=0.0)
    found: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        torch.manual_seed(dist.get_rank())
        (-forward(tiny_batches()[dist.get_rank()]).mean()).backward()
        told: dict[str, Any] = {"step": step, "model": model, "optimizer": optimizer}
        ctx.notify(GradientsReady(**told))
        got = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
        found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in got.items()}
        optimizer.step()
        optimizer.zero_grad()
        ctx.notify(Stepped(**told, loss=torch.zeros(())))
    auto = ctx.kernel.active["activations"].instance._auto  # type: ignore[attr-defined]
    return found, auto.choice.whole if auto is not None else 0


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected, _ = gradients("ddp", patched=False)
    for placement in ("ddp", "layers", "parts of layers"):
        got, whole = gradients(placement, patched=True)
        same = got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
        every = TwoProcesses().gather_objects((same, whole))
        if dist.get_rank() == 0:
            equal = "equal" if all(one[0] for one in every) else "different"
            print(f"{equal}: {placement}: {[one[1] for one in every]} of 4", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
