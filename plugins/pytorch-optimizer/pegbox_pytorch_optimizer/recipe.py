"""How an optimizer of `pytorch_optimizer` is made for a config: its class, its options, and what is fixed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

from pegbox.errors import ConfigError
from pegbox.record import Record
from pegbox.section import Section
from pydantic import Field

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]
Two = tuple[Beta, Beta]
Three = tuple[Beta, Beta, Beta]
BETAS = "Decay rates of its running averages, in the order of the paper."
ADDED = "Added to the root of the second average."


class LibraryOptimizer(Record):
    """An optimizer of `pytorch_optimizer`, by the name of its class, and what is fixed here."""

    class_name: str
    options: type[Section]
    doc: str
    fixed: Mapping[str, bool | str] = field(default_factory=dict)
    steps_sharded: bool = True
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: Any) -> Optimizer:
        """Make the optimizer.

        Raises:
            ConfigError: parameters are sharded, and it cannot step them.
        """
        if not self.steps_sharded:
            self._refuse_sharded(groups)
        return self._make(model, list(groups), options)

    def _make(self, model: Model, groups: list[dict[str, Any]], options: Any) -> Optimizer:
        import pytorch_optimizer

        given = {**self.fixed, **options.model_dump()}
        optimizer: Optimizer = getattr(pytorch_optimizer, self.class_name)(groups, **given)
        return optimizer

    def _refuse_sharded(self, groups: Sequence[dict[str, Any]]) -> None:
        from torch.distributed.tensor import DTensor

        from pegbox_pytorch_optimizer.optimizers import OPTIMIZERS

        if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
            able = ", ".join(name for name, recipe in OPTIMIZERS.items() if recipe.steps_sharded)
            raise ConfigError(
                f"optim.name is {self.class_name} of pytorch_optimizer, but parameters are sharded over processes",
                "It uses operations that torch does not have for sharded tensors.",
                f"Set optim.name to one that steps them ({able}, or adamw), or place the model unsharded.",
            )
