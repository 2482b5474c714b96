"""Optimizers of the library `pytorch_optimizer`."""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import Item


class PytorchOptimizerPlugin:
    """Declares optimizers that `optim.name` can name."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_pytorch_optimizer.optimizers import OPTIMIZERS

        return [Item(kind="optimizer", name=name, target=recipe, doc=recipe.doc) for name, recipe in OPTIMIZERS.items()]
