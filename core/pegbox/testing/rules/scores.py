"""What a scorer promises: one value for each rollout, in order, under its own name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from pegbox.rollouts import RolloutBatch, Score
from pegbox.testing.rule import require

Scorer = Callable[[RolloutBatch], Sequence[Score]]


def have_one_value_for_each_rollout(scorer: Scorer, rollouts: RolloutBatch) -> None:
    """Each score has as many values as there are rollouts, each a finite number or None."""
    scores = scorer(rollouts)
    require(
        bool(scores),
        "there is no score",
        "A scorer that says nothing is in the list for nothing.",
        "Return at least one Score; use None for rollouts to which it does not apply.",
    )
    for score in scores:
        wanted, values = len(rollouts.rollouts), score.values_R
        require(
            len(values) == wanted,
            f"the score '{score.name}' has {len(values)} values for {wanted} rollouts",
            "Values belong to rollouts by their place.",
            "Return one value for each rollout of rollouts.rollouts; None where it does not apply.",
        )
        bad = [value for value in values if not _is_value(value)]
        require(
            not bad,
            f"the score '{score.name}' holds {bad[0] if bad else None!r}",
            "Rewards are added up with weights: one NaN spoils the group's advantages.",
            "Return finite Python numbers or None.",
        )


def _is_value(value: object) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(float(value)))  # type: ignore[arg-type]


def follow_the_order(scorer: Scorer, rollouts: RolloutBatch) -> None:
    """The groups in reverse order get the same values in reverse order."""
    groups = [
        rollouts.rollouts[start : start + rollouts.samples]
        for start in range(0, len(rollouts.rollouts), rollouts.samples)
    ]
    reverse = replace(rollouts, rollouts=tuple(rollout for group in reversed(groups) for rollout in group))
    size = rollouts.samples
    for score, other in zip(scorer(rollouts), scorer(reverse), strict=True):
        pieces = [other.values_R[start : start + size] for start in range(0, len(other.values_R), size)]
        back = tuple(value for piece in reversed(pieces) for value in piece)
        require(
            repr(score.values_R) == repr(back) or len(back) != len(rollouts.rollouts),
            f"the score '{score.name}' gives {score.values_R}, and {back} when the prompts come in reverse order",
            "A value that belongs to another rollout rewards the wrong completion, silently.",
            "Compute the values in the order of rollouts.rollouts; sort nothing, and keep nothing between calls.",
        )


def have_names_of_their_own(scorer: Scorer, rollouts: RolloutBatch, plugin: str, *, named_by_config: bool) -> None:
    """Names are unique, constant (with no completions too), begin with the plugin's unless the config gives them."""
    names = [score.name for score in scorer(rollouts)]
    again = [score.name for score in scorer(rollouts)]
    require(
        len(set(names)) == len(names) and names == again,
        f"the scores are named {names}, and {again} at the next call",
        "The config weighs rewards by name, and metrics are logged under it.",
        "Give each score one constant name.",
    )
    alone = [score.name for score in scorer(replace(rollouts, rollouts=()))]
    require(
        alone == names,
        f"the scores are named {names}, and {alone} when there is no completion",
        "Before the first rollout a run asks who gives which reward, to find a mistyped name.",
        "Return Score(name=..., values_R=()) for no completions.",
    )
    foreign = [
        name for name in names if name != plugin and not name.startswith((f"{plugin}/", f"{plugin}-", f"{plugin}."))
    ]
    require(
        not foreign or named_by_config,
        f"plugin '{plugin}' names a score '{foreign[0] if foreign else ''}'",
        "Two plugins that choose the same free word cannot be active together.",
        f"Name it '{plugin}', or '{plugin}/...' if there are several.",
    )
