"""Scorers that break one promise each. The sound one scores the length of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pegbox.hooks import hookimpl
from pegbox.rollouts import RolloutBatch, Score


class SoundScores:
    """The number of tokens."""

    name = "sample"

    def values(self, rollouts: RolloutBatch) -> Sequence[Any]:
        return [float(len(rollout.completion)) for rollout in rollouts.rollouts]

    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> Sequence[Score]:
        return [Score(name=self.name, values_R=tuple(self.values(rollouts)))]


class NoScore(SoundScores):
    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> Sequence[Score]:
        return []


class ScorePerPrompt(SoundScores):
    def values(self, rollouts: RolloutBatch) -> Sequence[Any]:
        return super().values(rollouts)[:: rollouts.samples]


class NotANumber(SoundScores):
    def values(self, rollouts: RolloutBatch) -> Sequence[Any]:
        return [value if rollout.finished else float("nan") for value, rollout in self._pairs(rollouts)]

    def _pairs(self, rollouts: RolloutBatch) -> Any:
        return zip(super().values(rollouts), rollouts.rollouts, strict=True)


class SortedScores(SoundScores):
    def values(self, rollouts: RolloutBatch) -> Sequence[Any]:
        return sorted(super().values(rollouts))


class FreeName(SoundScores):
    name = "length"


class NumberedName(SoundScores):
    """Each call gives another name."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> Sequence[Score]:
        self.calls += 1
        return [Score(name=f"sample/{self.calls}", values_R=tuple(self.values(rollouts)))]


class SilentWithoutRollouts(SoundScores):
    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> Sequence[Score]:
        return super().score_rollouts(rollouts) if rollouts.rollouts else []
