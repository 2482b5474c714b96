"""AdamW of torchao, with state in 8 bits, 4 bits or fp8."""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import Item


class TorchaoOptimPlugin:
    """Declares optimizers that `optim.name` can name."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_torchao_optim.optimizers import OPTIMIZERS

        return [Item(kind="optimizer", name=name, target=recipe, doc=recipe.doc) for name, recipe in OPTIMIZERS.items()]
