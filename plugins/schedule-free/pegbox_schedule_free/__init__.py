"""Schedule-free optimizers: no learning-rate schedule, because the weights that count are an average."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import Item

if TYPE_CHECKING:
    from pegbox.types import Model, Outcome

    from pegbox_schedule_free.switching import WeightSwitch


class ScheduleFreePlugin:
    """Declares the optimizers; keeps the weights those of training or their average, as they are used."""

    def __init__(self) -> None:
        self._switch: WeightSwitch | None = None

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_schedule_free.optimizers import OPTIMIZERS

        return [Item(kind="optimizer", name=name, target=recipe, doc=recipe.doc) for name, recipe in OPTIMIZERS.items()]

    @hookimpl(wrapper=True)
    def place_model(self) -> Generator[None, Model, Model]:
        """Every forward of the policy first puts the right weights in place."""
        from pegbox_schedule_free.switching import WeightSwitch

        model = yield
        if model.role != "policy":
            return model
        self._switch = WeightSwitch(model)
        return self._switch.model

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted) and self._switch is not None:
            self._switch.follow(event.job.optimization.optimizer)

    @hookimpl(wrapper=True)
    def run_training(self) -> Generator[None, Outcome, Outcome]:
        """What is exported after training is the average."""
        outcome = yield
        if self._switch is not None:
            self._switch.to_average()
        return outcome
