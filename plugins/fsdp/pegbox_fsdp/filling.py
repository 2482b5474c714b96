"""Giving weights to processes that have none, one layer at a time.

The first process reads the model; the others hold its shape on the meta device. Right before a layer is sharded it is
made whole on every process, tensor by tensor, from the first one's values; sharding then keeps a part and frees the
rest. So a process holds its shards and at most one layer, never the model. Buffers go the same way, those that no
checkpoint holds (frequencies of rotary embeddings) too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from pegbox.errors import PluginError
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from pegbox.types import Runtime

SHOWN = 3


class Filler:
    """Brings tensors of modules to the device, on each process by itself or from the first one.

    Attributes:
        peak_bytes: the most that tensors made whole and not yet sharded took, for one layer.
    """

    def __init__(self, root: nn.Module, runtime: Runtime, *, from_first: bool) -> None:
        self._runtime, self._from_first = runtime, from_first and runtime.world_size > 1
        self._root = root
        self._done: set[tuple[int, str]] = set()
        self._facts: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.peak_bytes = 0
        if self._from_first:
            self._agree()

    def _agree(self) -> None:
        """Learn shapes and data types from the first process.

        Raises:
            PluginError: the processes have other tensors.
        """
        own = {name: (tensor.shape, tensor.dtype) for name, _, _, tensor in _tensors(self._root)}
        every = [own if self._runtime.rank == 0 else {name: shape for name, (shape, _) in own.items()}]
        told = self._runtime.gather_objects(every[0])
        self._facts = told[0]  # type: ignore[assignment]
        shapes = {name: shape for name, (shape, _) in self._facts.items()}
        for rank, other in enumerate(told[1:], start=1):
            unlike = sorted(name for name in shapes.keys() | other.keys() if shapes.get(name) != other.get(name))  # type: ignore[attr-defined]
            if unlike:
                raise PluginError(
                    f"process {rank} has other weights than the first: {', '.join(unlike[:SHOWN])}",
                    "It was to build the same model without reading values, and a plugin changed it by them.",
                    "Set fsdp.load to every.",
                )

    def fill(self, layer: nn.Module, name: str) -> None:
        """Make the tensors of a layer whole on the device; what was sharded or filled before is left alone."""
        made: dict[int, Tensor] = {}
        total = 0
        for path, owner, key, tensor in _tensors(layer, name):
            if isinstance(tensor, DTensor) or (id(owner), key) in self._done:
                continue
            self._done.add((id(owner), key))
            if id(tensor) not in made:
                made[id(tensor)] = self._whole(path, tensor)
                total += made[id(tensor)].numel() * made[id(tensor)].element_size()
            if made[id(tensor)] is not tensor:
                (owner._parameters if key in owner._parameters else owner._buffers)[key] = made[id(tensor)]
        self.peak_bytes = max(self.peak_bytes, total)

    def _whole(self, path: str, tensor: Tensor) -> Tensor:
        if not self._from_first or self._runtime.rank == 0:
            values = tensor.detach().to(self._runtime.device)
            values = values.contiguous() if self._from_first else values
        else:
            shape, dtype = self._facts[path]
            values = torch.empty(shape, dtype=dtype, device=self._runtime.device)
        if self._from_first and values.numel():
            distributed.broadcast(values, src=0)
        if not isinstance(tensor, nn.Parameter):
            return values
        if tensor.is_meta:
            whole = nn.Parameter(values, requires_grad=tensor.requires_grad)
            whole.__dict__.update(tensor.__dict__)
            return whole
        tensor.data = values
        return tensor

    def finish(self) -> None:
        """Raise on all processes if one is left with a tensor that has no values.

        Raises:
            PluginError: naming it.
        """
        missing = [name for name, value in _attributes(self._root) if value.is_meta]
        missing += [name for name, _, _, value in _tensors(self._root) if value.is_meta]
        for rank, names in enumerate(self._runtime.gather_objects(missing)):
            if names:
                raise PluginError(
                    f"process {rank} has no values for {', '.join(names[:SHOWN])}",  # type: ignore[index]
                    "They are neither parameters nor buffers, so they are not sent.",
                    "Set fsdp.load to every.",
                )


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Parameters and buffers under each of their names: (name, the module that holds it, its key there, tensor)."""
    for path, part in module.named_modules(prefix=prefix):
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{path}.{key}" if path else key, part, key, tensor


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are plain attributes of modules."""
    for path, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                yield f"{path}.{key}", value
