"""An environment for `grpo.rollout_func`: two turns, the second token of which is the environment's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pegbox import hooks
from pegbox.rollouts import RolloutBatch, RolloutRequest

CALLS: list[RolloutRequest] = []
SAID = 9


def play(ctx: Any, request: RolloutRequest) -> RolloutBatch:
    """What the engine samples, with a token of the environment after its first."""
    CALLS.append(request)
    made = ctx.call(hooks.generate_rollouts, ctx, request)
    rollouts = []
    for one in made.rollouts:
        completion = (*one.completion[:1], SAID, *one.completion[1:])
        trained = tuple(at != 1 for at in range(len(completion)))
        logps = (*one.logps[:1], float("nan"), *one.logps[1:])
        rollouts.append(replace(one, completion=completion, logps=logps, trained=trained))
    return replace(made, rollouts=tuple(rollouts))


def fails(ctx: Any, request: RolloutRequest) -> RolloutBatch:
    """An environment that breaks."""
    raise ValueError("game over")


def silent(ctx: Any, request: RolloutRequest) -> None:
    """An environment that forgets its return."""


not_a_function = 3
