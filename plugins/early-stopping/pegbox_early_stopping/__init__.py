"""Early stopping: a run ends when its evaluations no longer improve."""

from __future__ import annotations

from pegbox.context import Context
from pegbox.events import Evaluated, Event, RunEnded, RunStarted, Signal
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

from pegbox_early_stopping.config import EarlyStoppingConfig
from pegbox_early_stopping.patience import Patience


class EarlyStoppingPlugin:
    """Watches evaluations and asks the loop to stop. Checkpoints keep what it has seen."""

    def __init__(self) -> None:
        self._patience = Patience()

    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=EarlyStoppingConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> Signal | None:
        if isinstance(event, RunStarted):
            self._patience.require_evaluation(event.job)
        if isinstance(event, Evaluated):
            return self._patience.see(ctx.section(EarlyStoppingConfig), event)
        if isinstance(event, RunEnded) and self._patience.evaluations < 2:
            ctx.log.warning("early-stopping saw one evaluation and could not stop anything; set trainer.eval_every")
        return None

    def state_dict(self) -> dict[str, object]:
        return self._patience.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._patience.load_state_dict(state_dict)
