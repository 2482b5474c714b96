"""Rewards by Python functions: your own by import path, and built-in ones by name. They run in other processes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutBatch, Score
    from pegbox.rows import Dataset, Split

    from pegbox_reward_functions.scoring import Scorer

BUILTIN = {
    "exact": ("exact:exact", "1 if the completion, or a part of it, is the row's answer."),
    "math": ("mathematics:mathematics", "1 if the completion's answer equals the row's as mathematics (math-verify)."),
    "format": ("form:form", "1 if the completion has the form: tags in order, or a regular expression."),
    "length": ("length:length", "Soft punishment of long completions (DAPO, eq. 13), or of the distance to a length."),
    "code": ("code:code", "Share of the row's tests that the completion's program passes, in a limited process."),
    "reasoning-gym": ("gym:gym", "What the task of reasoning-gym that made the row says of the answer."),
}
SOURCE = "pegbox_reward_functions.gym_rows:gym_rows"


class RewardFunctionsPlugin:
    """Scores completions."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reward_functions.config import RewardFunctionsConfig

        return ConfigSection(schema=RewardFunctionsConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        package = "pegbox_reward_functions.builtin"
        rewards = [
            Item(kind="reward", name=name, target=f"{package}.{target}", doc=doc)
            for name, (target, doc) in BUILTIN.items()
        ]
        doc = "Tasks that reasoning-gym makes: columns prompt, question, answer, entry."
        return [*rewards, Item(kind="source", name="reasoning-gym", target=SOURCE, doc=doc)]

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            self._ready(ctx)

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context, split: Split) -> Generator[None, Dataset | None, Dataset | None]:
        """Compare what functions require with the columns of the rows, before a model is loaded; pass the rows on."""
        rows = yield
        if rows is not None and ctx.purpose == "run":
            from pegbox_reward_functions.columns import require_columns

            require_columns(self._ready(ctx).rewards, rows)
        return rows

    @hookimpl
    def score_rollouts(self, ctx: Context, rollouts: RolloutBatch) -> Sequence[Score]:
        return self._ready(ctx).scores(rollouts, ctx.processor.tokenizer)

    def _ready(self, ctx: Context) -> Scorer:
        from pegbox_reward_functions.config import RewardFunctionsConfig
        from pegbox_reward_functions.scoring import Scorer

        if self._scorer is None:
            self._scorer = Scorer(ctx, ctx.section(RewardFunctionsConfig))
        return self._scorer
