"""One training loop, and what it stands on: runtime, placement, batches, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.events import Event, RunEnded
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource, Examples
    from pegbox.types import CheckpointStore, Job, Model, Outcome, Runtime

    from pegbox_trainer.gradient_proof import GradientProof
    from pegbox_trainer.record import RunRecord


class TrainerPlugin:
    """Owns `build_runtime`, `place_model`, `build_batches`, `open_checkpoints` and `run_training`."""

    _record: RunRecord | None = None
    _proof: GradientProof | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_trainer.config import TrainerConfig

        return ConfigSection(schema=TrainerConfig)

    @hookimpl
    def build_runtime(self, ctx: Context) -> Runtime:
        from pegbox_trainer.runtime import build_runtime

        return build_runtime(ctx)

    @hookimpl
    def place_model(self, ctx: Context, model: Model) -> Model:
        from pegbox_trainer.placement import place

        return place(ctx, model)

    @hookimpl
    def build_batches(self, ctx: Context, dataset: Examples) -> BatchSource:
        from pegbox_trainer.batches import EvalBatches, TrainBatches

        return TrainBatches(ctx, dataset) if dataset.split == "train" else EvalBatches(ctx, dataset)

    @hookimpl
    def open_checkpoints(self, ctx: Context) -> CheckpointStore:
        from pegbox_trainer.checkpoints import FolderStore

        return FolderStore.open(ctx)

    @hookimpl
    def run_training(self, ctx: Context, job: Job) -> Outcome:
        from pegbox_trainer.loop import TrainingLoop
        from pegbox_trainer.record import RunRecord

        self._record = RunRecord.open(ctx, job)
        return TrainingLoop(ctx, job).run()

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        from pegbox_trainer.gradient_proof import gradient_proof

        self._proof = gradient_proof(ctx, event, self._proof)
        if isinstance(event, RunEnded) and self._record is not None:
            self._record.close(event.outcome)
