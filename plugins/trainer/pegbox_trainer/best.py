"""The checkpoint where an evaluation was best: it is saved when it is found, stays when others go, and is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, did_you_mean

from pegbox_trainer.checkpoints import FolderStore
from pegbox_trainer.config import TrainerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pegbox.types import Checkpoint, CheckpointStore


@dataclass
class BestCheckpoint:
    """What was best so far; nothing is if the config names no metric."""

    metric: str | None
    lowest: bool
    store: CheckpointStore
    step: int | None = None
    value: float = 0.0

    @classmethod
    def of(cls, config: TrainerConfig, store: CheckpointStore, *, evaluated: bool) -> BestCheckpoint:
        """As the config asks.

        Raises:
            ConfigError: there are no held-out rows, or another plugin owns the store and cannot keep one checkpoint.
        """
        if config.best is not None and not evaluated:
            raise ConfigError(
                f"trainer.best is {config.best}, but there are no held-out rows",
                "Without evaluations no checkpoint is the best.",
                "Name held-out rows in the data section, or remove trainer.best.",
            )
        if config.best is not None and not isinstance(store, FolderStore):
            raise ConfigError(
                f"trainer.best cannot keep a checkpoint in a {type(store).__name__}",
                "Only the trainer's own store knows a checkpoint that stays.",
                "Set use: {open_checkpoints: trainer}, or remove trainer.best.",
            )
        return cls(config.best, config.best_is != "highest", store)

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best so far; then the checkpoint of its step is the one to keep.

        Raises:
            ConfigError: the evaluation has no such metric.
        """
        if self.metric is None:
            return False
        if self.metric not in metrics:
            raise ConfigError(
                f"trainer.best is {self.metric}, which the evaluation does not give",
                f"It gives {', '.join(metrics)}.",
                f"Set trainer.best to one of them. {did_you_mean(self.metric, metrics)}",
            )
        value = metrics[self.metric]
        better = self.step is None or (value < self.value if self.lowest else value > self.value)
        if better:
            self.load_state_dict({"step": step, "value": value})
        return better

    def checkpoint(self) -> Checkpoint | None:
        """The best checkpoint on disk."""
        return next((found for found in self.store.list() if found.step == self.step), None)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.value = state["step"], state["value"]
        if isinstance(self.store, FolderStore):
            self.store.best = self.step
