"""One training loop, and what it stands on: runtime, placement, batches, checkpoints."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pegbox.events import CheckpointSaved, Event, RunEnded, RunFailed, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource, Dataset, Examples, Split
    from pegbox.types import Checkpoint, CheckpointStore, Job, Model, Outcome, Runtime

    from pegbox_trainer.gradient_proof import GradientProof
    from pegbox_trainer.record import RunRecord


class TrainerPlugin:
    """Owns `build_runtime`, `place_model`, `build_batches`, `open_checkpoints` and `run_training`; looks at rows."""

    _latest: Checkpoint | None = None
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

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context, split: Split) -> Generator[None, Dataset | None, Dataset | None]:
        """Say that there is nothing to evaluate on before a model is loaded; rows are passed on as they are."""
        rows = yield
        if rows is None and split == "eval" and ctx.purpose == "run":
            from pegbox_trainer.config import TrainerConfig, refuse_evaluation

            refuse_evaluation(ctx.section(TrainerConfig))
        return rows

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
        match event:
            case RunStarted():
                self._latest = event.job.resume
            case CheckpointSaved():
                self._latest = event.checkpoint
            case RunFailed() if self._latest is not None and ctx.runtime.rank == 0:
                from pegbox_trainer.resuming import how_to_go_on

                ctx.log.warning("%s", how_to_go_on(self._latest))
            case RunEnded() if self._record is not None:
                self._record.close(event.outcome)
