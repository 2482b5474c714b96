"""Rewards of rollouts: each rank has its own part scored, every rank gets all, and the config weighs them by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pegbox import hooks
from pegbox.errors import PluginError, RunError
from pegbox.rollouts import Rollout, RolloutBatch, Score

from pegbox_grpo.refusals import require_given

if TYPE_CHECKING:
    from pegbox.context import Context
    from torch import Tensor

SHOWN = 80
"""Characters of a text that a message shows."""


@dataclass(frozen=True)
class Rewards:
    """K named rewards of R completions.

    Attributes:
        names: K of them, in the order in which plugins gave them.
        values_RK: float64; NaN where a reward does not apply.
        weights_K: float64; 1 unless the config says otherwise.
    """

    names: tuple[str, ...]
    values_RK: Tensor
    weights_K: Tensor

    def of(self, at: int) -> dict[str, float | None]:
        """The rewards of one completion by name; None where one does not apply."""
        values = self.values_RK[at].tolist()
        return {name: None if math.isnan(value) else value for name, value in zip(self.names, values, strict=True)}


def score(ctx: Context, rollouts: Sequence[Rollout], samples: int) -> Rewards:
    """The rewards of all rollouts, which every rank holds.

    Raises:
        PluginError: a scorer gave another number of values than there are completions.
        ConfigError: the config weighs a reward that nobody gives.
        RunError: a reward is not a number, or none applies to a completion.
    """
    rank, ranks = ctx.runtime.rank, ctx.runtime.world_size
    prompts = len(rollouts) // samples
    first, after = (prompts * part // ranks * samples for part in (rank, rank + 1))
    own: dict[str, tuple[float | None, ...]] = {}
    if after > first:
        batch = RolloutBatch(rollouts=tuple(rollouts[first:after]), samples=samples)
        for plugin, scores in ctx.each(hooks.score_rollouts, ctx, batch):
            own.update((one.name, _checked(one, plugin, after - first)) for one in scores)
    parts: list[dict[str, tuple[float | None, ...]]] = [part for part in ctx.runtime.gather_objects(own) if part]  # type: ignore[misc]
    names = tuple(parts[0]) if parts else ()
    if not names:
        scorers = ", ".join(one.plugin for one in ctx.kernel.implementations(hooks.score_rollouts.__name__))
        raise RunError(
            f"{scorers} scored {len(rollouts)} completions with no reward at all",
            "Without a reward there is nothing to learn.",
            "Fix the plugin: score_rollouts returns a Score for each of its rewards.",
        )
    if any(part.keys() != set(names) for part in parts):
        raise RunError(
            f"the processes have different rewards: {' and '.join(str(sorted(part)) for part in parts)}",
            "Each reward is given by every process, for its part of the completions.",
            "Fix the plugin that scores rollouts.",
        )
    columns = [[value for part in parts for value in part[name]] for name in names]
    values_RK = torch.tensor(
        [[math.nan if value is None else float(value) for value in column] for column in columns], dtype=torch.float64
    ).T
    _require_one(values_RK, rollouts, names, ctx)
    return Rewards(names, values_RK, _weights(ctx, names))


def _checked(one: Score, plugin: str, count: int) -> tuple[float | None, ...]:
    if len(one.values_R) != count:
        raise PluginError(
            f"plugin '{plugin}' gave {len(one.values_R)} values of the reward '{one.name}' for {count} completions",
            "Each completion has one; None where the reward does not apply.",
            f"Fix {plugin}.",
        )
    bad = [(at, value) for at, value in enumerate(one.values_R) if value is not None and not math.isfinite(value)]
    if bad:
        raise RunError(
            f"the reward '{one.name}' of plugin '{plugin}' is {bad[0][1]} for completion {bad[0][0]} of the step",
            "Advantages of its whole group would be no numbers.",
            "Return a finite number, or None where the reward does not apply.",
        )
    return one.values_R


def _require_one(values_RK: Tensor, rollouts: Sequence[Rollout], names: Sequence[str], ctx: Context) -> None:
    without = values_RK.isnan().all(1).nonzero().flatten().tolist()
    if without:
        first = rollouts[without[0]]
        shown, asked = (repr(text_of(ctx, ids)[-SHOWN:]) for ids in (first.completion, first.prompt))
        raise RunError(
            f"no reward applies to {len(without)} of {len(rollouts)} completions; the first is {shown} of the prompt "
            f"{asked}",
            f"Each of {', '.join(names)} gave None for it, so nothing says how good it is.",
            "Let one of the rewards give a number.",
        )


def _weights(ctx: Context, names: Sequence[str]) -> Tensor:
    weights: Mapping[str, float] = ctx.config.run.rewards
    require_given(ctx, names)
    return torch.tensor([weights.get(name, 1.0) for name in names], dtype=torch.float64)


def text_of(ctx: Context, ids: Sequence[int]) -> str:
    """Tokens as text, special tokens included."""
    return str(ctx.processor.tokenizer.decode(list(ids), skip_special_tokens=False))
