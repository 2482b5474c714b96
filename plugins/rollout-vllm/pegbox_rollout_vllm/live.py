"""The trainer's weights under the names of an exported checkpoint, without a file.

What vLLM's `load_weights` understands are the names of published checkpoints. transformers renames, joins and splits
some of these on loading (experts above all) and reverts that on saving; here the same is done, one layer at a time, so
that never more than a layer is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class LiveWeights(Mapping[str, "Tensor"]):
    """Tensors of a module by their names in a checkpoint; tied ones once, by their first name."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers: list[list[str]] = []
        self._places: dict[str, int] = {}
        self._latest: tuple[tuple[int, ...], dict[str, Tensor]] | None = None
        layers: dict[str, list[str]] = {}
        for name in self._state():
            layers.setdefault(_layer(name), []).append(name)
        for index, names in enumerate(layers.values()):
            self._layers.append(names)
            self._places.update(dict.fromkeys(self._read(index, meta=True), index))

    def _state(self) -> dict[str, Tensor]:
        """The module's state, without second names of one tensor."""
        seen: set[int] = set()
        state = {}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor
        return state

    def _read(self, index: int, *, meta: bool = False) -> dict[str, Tensor]:
        """The tensors of one layer; `meta`: their shapes alone."""
        state = self._state()
        layer = {name: state[name].detach() for name in self._layers[index]}
        if meta:
            layer = {name: tensor.to("meta") for name, tensor in layer.items()}
        if not hasattr(self._module, "save_pretrained"):
            return layer
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._module, layer))

    def __getitem__(self, name: str) -> Tensor:
        index = self._places[name]
        # What was split or joined is a copy, and old as soon as somebody writes into what it was made of.
        now = (index, *self.stamp())
        if self._latest is None or self._latest[0] != now:
            self._latest = (now, self._read(index))
        return self._latest[1][name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def entries(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Names, tensors, and the data type to send them in: that of the server for parameters, buffers keep theirs."""
        buffers = {name for name, _ in self._module.named_buffers()}
        for index in range(len(self._layers)):
            for name, tensor in self._read(index).items():
                kept = name in buffers or not tensor.is_floating_point()
                yield name, tensor, tensor.dtype if kept else dtype

    def stamp(self) -> tuple[int, ...]:
        """How often each tensor was written, by torch's own count; it changes with the weights."""
        return tuple(tensor._version for tensor in self._state().values())


def _layer(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
