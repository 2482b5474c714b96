"""Whole weights on the first process, for the time of an export.

One tensor at a time is gathered on the device and kept, by the first process alone, in host memory. Under an adapter
only what is trained is gathered; the rest of the model then has no values, so that nobody writes shards by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model


@contextmanager
def whole(ctx: Context, model: Model) -> Iterator[None]:
    """Within it the parameters of a sharded model are plain and whole on the first process."""
    shards = [p for p in model.module.parameters() if isinstance(p, DTensor)]
    wanted = {id(p) for p in shards if model.adapter is None or p.requires_grad}
    made: dict[int, nn.Parameter] = {}
    for parameter in shards:
        values = gather(parameter, ctx.runtime.device) if id(parameter) in wanted else None
        if ctx.runtime.rank == 0:
            kept = torch.empty_like(parameter.to_local(), device="meta") if values is None else values.cpu()
            made[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        del values
    places = [
        (part, key, parameter)
        for part in model.module.modules()
        for key, parameter in part._parameters.items()
        if id(parameter) in made
    ]
    try:
        for part, key, parameter in places:
            part._parameters[key] = made[id(parameter)]
        yield
    finally:
        for part, key, parameter in places:
            part._parameters[key] = parameter
    ctx.runtime.barrier()


def gather(shard: DTensor, device: torch.device) -> torch.Tensor:
    """The whole of a tensor, on every process, on the device; offloaded shards are brought there first."""
    local = shard.detach().to_local()
    on_mesh = DTensor.from_local(
        local.to(device), shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )
    return on_mesh.full_tensor()
