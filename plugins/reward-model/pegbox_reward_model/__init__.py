"""Completions scored by reward models: by a whole answer, or step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutBatch, Score

    from pegbox_reward_model.judging import Judge


class RewardModelPlugin:
    """Answers `score_rollouts` with one score for each model; they are opened when the run starts."""

    def __init__(self) -> None:
        self._judges: tuple[Judge, ...] | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reward_model.config import RewardModelConfig

        return ConfigSection(schema=RewardModelConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        """Say at once what is not there, and open the models before the first completion is sampled."""
        from pegbox_reward_model.config import RewardModelConfig, require_there

        if isinstance(event, RunBegins):
            for wanted in ctx.section(RewardModelConfig).models:
                require_there(ctx, wanted)
                if not ctx.config.path(wanted.name).is_dir():
                    from pegbox_reward_model.judging import tokenizer_of

                    tokenizer_of(ctx, wanted)  # asks the hub now, and not when everything else is loaded
        elif isinstance(event, RunStarted):
            self._open(ctx)

    @hookimpl
    def score_rollouts(self, ctx: Context, rollouts: RolloutBatch) -> Sequence[Score]:
        from pegbox.rollouts import Score

        from pegbox_reward_model.config import RewardModelConfig

        if not rollouts.rollouts:  # asked for names alone, which no model is needed for
            return [Score(name=wanted.score_name, values_R=()) for wanted in ctx.section(RewardModelConfig).models]
        return [Score(name=judge.name, values_R=judge.score(rollouts.rollouts)) for judge in self._open(ctx)]

    def _open(self, ctx: Context) -> tuple[Judge, ...]:
        from pegbox_reward_model.config import RewardModelConfig
        from pegbox_reward_model.judging import open_judge

        if self._judges is None:
            settings = ctx.section(RewardModelConfig)
            self._judges = tuple(open_judge(ctx, settings, wanted) for wanted in settings.models)
        return self._judges
