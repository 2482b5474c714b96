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
    """A layer's keys and values `_BKUD`, seen as the filled part of larger tensors with room for `most` tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended(self.keys, key_states)
        self.values = self._appended(self.values, value_states)
        return self.keys, self.values

    def _appended(self, had: Tensor, new: Tensor) -> Tensor:
        if had.numel() == 0:
            return new
        used = had.shape[-2]
        needed = used + new.shape[-2]
        # A head's tokens stand together, so what lies between two heads is room. Rows that were chosen or doubled are a
        # tensor of their own, without any; what they were chosen from is free from then on.
        if had.stride(1) // had.stride(2) < needed:
            size = max(needed, min(self._most, needed + max(LEAST, needed // 2)))
            room = torch.empty(*had.shape[:2], size, had.shape[3], dtype=had.dtype, device=had.device)
            room[:, :, :used] = had
            had = room
        grown = had.as_strided((*had.shape[:2], needed, had.shape[3]), had.stride())
        grown[:, :, used:] = new
        return grown


def roomy_cache(config: Any, most: int) -> DynamicCache:
    """The dynamic cache of a model, whose layers over whole rows have room; others stay as transformers makes them.

    Args:
        most: tokens that a row will have at the most.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
