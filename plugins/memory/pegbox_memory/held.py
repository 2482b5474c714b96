"""A cache that takes the tokens of one forward, and has room for the one that is added already."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class HeldLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values as the first forward gave them; a token that is added takes the place of the last one."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the one that is added."""
        return int(self.keys.shape[-2]) - 1 if self.is_initialized else 0


def held_cache(config: Any) -> DynamicCache:
    """The dynamic cache of a model, whose layers over whole rows hold; others stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [HeldLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
