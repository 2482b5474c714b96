"""What one layer keeps for the backward, seen while it computes.

What autograd saves is caught by torch's hooks for saved tensors, each storage once; the layer's own tensors, what it
was given and what it returns are not counted, because they stay in memory whatever the layer keeps. Where an allocator
counts, the larger of the two figures is taken: what a function keeps without telling autograd is then in it.

    L  tokens of a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pegbox_activations.attention import AttentionBytes
from pegbox_activations.budget import LayerBytes


def measured(
    module: nn.Module, call: Callable[[], Any], given: object, row: int, allocated: Callable[[], int]
) -> tuple[Any, LayerBytes]:
    """Run a layer's forward, and say what it keeps.

    Args:
        module: the layer.
        call: its forward.
        given: its arguments.
        row: L of the micro-batch.
        allocated: bytes on the device; a constant where nobody counts them.
    """
    own = {_address(tensor) for tensor in (*module.parameters(), *module.buffers())}
    shapes = {tuple(p.shape[::step]) for p in module.parameters() for step in (1, -1)}
    seen: dict[int, tuple[int, str]] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in own:
            seen[address] = (tensor.untyped_storage().nbytes(), _kind(tensor, shapes, row))
        return tensor

    before = allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), AttentionBytes() as attention:
        output = call()
    returned = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(output)}
    inputs = {_address(tensor) for tensor in _tensors(given)}
    grown = allocated() - before - sum(size for address, size in returned.items() if address not in inputs)
    sizes = dict.fromkeys(("weights", "tokens", "pairs"), 0)
    for address, (size, kind) in seen.items():
        if address not in returned and address not in inputs:
            sizes[kind] += size
    sizes["tokens"] += max(0, grown - sum(sizes.values()))
    return output, LayerBytes(**sizes, attention=attention.total)


def signature(module: nn.Module) -> tuple[object, ...]:
    """The same for layers that keep the same: what they are made of."""
    return tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters())


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer computes from: its first tensor."""
    return next(_tensors((args, kwargs)))


def _kind(tensor: Tensor, weights: set[tuple[int, ...]], row: int) -> str:
    shape = tuple(tensor.shape)
    if shape in weights:
        return "weights"
    return "pairs" if len(shape) > 2 and row > 1 and shape[-2:] == (row, row) else "tokens"


def _address(tensor: Tensor) -> int:
    local = getattr(tensor, "to_local", None)
    return (tensor if local is None else local()).untyped_storage().data_ptr()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for part in value.values() for tensor in _tensors(part))
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in _tensors(part))


def parts_of(weight: Tensor) -> list[Tensor]:
    """The tensors that a weight lies in: itself, or those that a subclass keeps it in (packed values and scales)."""
    names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
    return [getattr(weight, name) for name in names] or [weight]
