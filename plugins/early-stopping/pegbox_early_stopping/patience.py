"""Counting evaluations without an improvement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, did_you_mean
from pegbox.events import Evaluated, Signal

if TYPE_CHECKING:
    from pegbox.types import Job

    from pegbox_early_stopping.config import EarlyStoppingConfig


class Patience:
    """The best value so far, at which step, and how many evaluations have passed since.

    An evaluation of a step that was already counted (after a resume) counts once.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0
        self.seen_step = -1
        self.evaluations = 0

    def require_evaluation(self, job: Job) -> None:
        """Raise if there is nothing to evaluate.

        Raises:
            ConfigError: there are no held-out rows.
        """
        if job.eval is None:
            raise ConfigError(
                "early-stopping is in plugins, but there are no held-out rows",
                "It watches evaluations: without one it would do nothing.",
                "Name held-out rows in the data section and set trainer.eval_every, or remove early-stopping.",
            )

    def see(self, config: EarlyStoppingConfig, event: Evaluated) -> Signal | None:
        """Take one evaluation in; STOP when patience is over.

        Raises:
            ConfigError: the evaluation has no such metric.
        """
        if config.metric not in event.metrics:
            raise ConfigError(
                f"early-stopping.metric is '{config.metric}', which the evaluation does not have",
                did_you_mean(config.metric, event.metrics, "It has:"),
                "Correct early-stopping.metric.",
            )
        if event.step == self.seen_step:
            return None
        self.seen_step = event.step
        self.evaluations += 1
        value = event.metrics[config.metric] * (-1.0 if config.better == "higher" else 1.0)
        if self.best is None or value < self.best - config.min_delta:
            self.best, self.best_step, self.waited = value, event.step, 0
            return None
        self.waited += 1
        return Signal.STOP if self.waited >= config.patience else None

    def state_dict(self) -> dict[str, object]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
