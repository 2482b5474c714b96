"""The properties of the reward that the paper asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pegbox.rollouts import Rollout, RolloutBatch
from pegbox_cosine_reward import CosineRewardPlugin, cosine
from pegbox_cosine_reward.config import CosineRewardConfig

CONFIG = CosineRewardConfig(max_tokens=100)


class Characters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def score(text: str, answer: str | None = "42", finished: bool = True) -> float | None:
    rollout = Rollout(
        prompt=(1,),
        completion=tuple(map(ord, text)),
        logps=(0.0,) * len(text),
        first_version=0,
        last_version=0,
        finished=finished,
        columns={} if answer is None else {"answer": answer},
    )
    ctx = SimpleNamespace(section=lambda schema: CONFIG, processor=SimpleNamespace(tokenizer=Characters()))
    (result,) = CosineRewardPlugin().score_rollouts(ctx, RolloutBatch(rollouts=(rollout,), samples=1))
    assert result.name == "cosine-reward"
    return result.values_R[0]


def test_the_curve_meets_its_two_ends_and_their_mean_in_the_middle() -> None:
    assert cosine(0, 100, -10.0, 0.0) == pytest.approx(-10.0)
    assert cosine(50, 100, -10.0, 0.0) == pytest.approx(-5.0)
    assert cosine(100, 100, -10.0, 0.0) == pytest.approx(0.0)


def test_a_short_right_answer_earns_more_than_a_long_one_and_a_wrong_one_less() -> None:
    short, long = score("42"), score("therefore " * 5 + "42")
    assert short > long > 1.0
    assert score("41") < score("therefore " * 5 + "41") < 0.0


def test_a_completion_that_was_cut_off_earns_the_fixed_reward_even_if_right() -> None:
    assert score("42", finished=False) == CONFIG.cut_off
    assert score("x" * 98 + "42") == CONFIG.cut_off


def test_a_row_without_an_answer_gets_no_score() -> None:
    assert score("42", answer=None) is None
