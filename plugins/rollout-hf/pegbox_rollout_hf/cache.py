"""Keys and values of a growing number of tokens, written where there is room, instead of copied with every token.

transformers' dynamic cache joins what it has and what is new into new tensors with every token and layer: sampling S
tokens copies S * S / 2 of them. Here a layer reserves room ahead and appends in place.

    B  rows    K  heads of keys    U  tokens in the cache    D  size of a head
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 32
"""Tokens of room at least: small rooms are outgrown at once."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values `_BKUD`, seen as the filled part of larger tensors."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: list[Tensor | None] = [None, None]
        keys: Tensor = self._appended(0, self.keys, key_states)
        values: Tensor = self._appended(1, self.values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _appended(self, which: int, had: Tensor, new: Tensor) -> Tensor:
        if had.numel() == 0:
            return new
        used, room = had.shape[-2], self._rooms[which]
        needed = used + new.shape[-2]
        # Rows that were chosen or doubled are another tensor: they get a room of their own.
        if room is None or had.data_ptr() != room.data_ptr() or had.shape[0] != room.shape[0] or room.shape[2] < needed:
            size = needed + max(LEAST, needed // 2)
            room = torch.empty(*had.shape[:2], size, had.shape[3], dtype=had.dtype, device=had.device)
            room[:, :, :used] = had
            self._rooms[which] = room
        room[:, :, used:needed] = new
        return room[:, :, :needed]


def roomy_cache(config: Any) -> DynamicCache:
    """The dynamic cache of a model, whose layers over whole rows have room; others stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
