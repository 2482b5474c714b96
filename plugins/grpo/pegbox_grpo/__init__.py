"""Online policy optimisation: completions are sampled, scored and learnt from (GRPO and its relatives, RLOO, GDPO)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunStarted
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource, Dataset, Split
    from pegbox.types import Loss, Model, ModulePatch

    from pegbox_grpo.source import OnlineBatches
    from pegbox_grpo.temperature import Tempering


class GrpoPlugin:
    """Wraps `build_batches`, owns `build_loss`; looks at rows; patches the head where the temperature is not 1."""

    _training: OnlineBatches | None = None
    _tempering: Tempering | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_grpo.config import GrpoConfig

        return ConfigSection(schema=GrpoConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_grpo import health
        from pegbox_grpo.names import DOCS, EXTREMES

        target = "pegbox_grpo.trajectories:with_rollouts"
        extras = [Item(kind="extra", name=name, target=target, doc=doc) for name, doc in DOCS.items()]
        extremes = [Item(kind="metric", name=name, target=which, doc=doc) for name, (which, doc) in EXTREMES.items()]
        return [*extras, *extremes, *health.items()]

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_grpo.config import GrpoConfig
            from pegbox_grpo.refusals import refuse

            refuse(ctx, ctx.section(GrpoConfig))
        if isinstance(event, RunStarted) and event.step == 0 and self._training is not None:
            self._training.file.cut(0)

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context, split: Split) -> Generator[None, Dataset | None, Dataset | None]:
        """Compare rows and names of rewards with what is asked for, before a model is loaded; pass the rows on."""
        rows = yield
        if rows is not None and split == "train" and ctx.purpose == "run":
            from pegbox_grpo.config import GrpoConfig
            from pegbox_grpo.refusals import refuse_rows

            refuse_rows(ctx, ctx.section(GrpoConfig), rows)
        return rows

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "adapted":
            return []
        from pegbox_grpo.config import GrpoConfig
        from pegbox_grpo.temperature import Tempering, patches

        if self._tempering is None:
            self._tempering = Tempering(ctx.section(GrpoConfig).temperature)
            ctx.phase_observers.append(self._tempering.observe)
        return patches(model, self._tempering)

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_grpo.config import GrpoConfig
        from pegbox_grpo.loss import GrpoLoss

        return GrpoLoss(ctx.section(GrpoConfig))

    @hookimpl(wrapper=True)
    def build_batches(self, ctx: Context, model: Model, dataset: Dataset) -> Generator[None, BatchSource, BatchSource]:
        from pegbox_grpo.config import GrpoConfig
        from pegbox_grpo.refusals import refuse_lengths
        from pegbox_grpo.source import EvalRollouts, OnlineBatches, row_source

        source = yield
        refuse_lengths(model, dataset, ctx.section(GrpoConfig))
        if dataset.split == "train":
            self._training = OnlineBatches(ctx, model, row_source(source), ctx.section(GrpoConfig))
            return self._training
        assert self._training is not None, "the training split comes first"
        return EvalRollouts(ctx, source.examples, self._training)
