"""Optimizers of bitsandbytes: state in 8 bits, or in memory that pages out to the host."""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import Item


class BnbOptimPlugin:
    """Declares optimizers that `optim.name` can name."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_bnb_optim.optimizers import OPTIMIZERS

        return [Item(kind="optimizer", name=name, target=recipe, doc=recipe.doc) for name, recipe in OPTIMIZERS.items()]
