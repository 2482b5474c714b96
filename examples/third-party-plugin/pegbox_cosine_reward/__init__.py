"""A reward for the length of a chain of thought: right answers should be short, wrong ones think longer.

Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv:2502.03373, the cosine reward:

    R(t) = r_L + (r_0 - r_L) / 2 * (1 + cos(pi * t / L))

for a completion of t tokens of at most L, with one pair (r_0, r_L) for right answers and one for wrong ones,
and a fixed reward for a completion that was cut off at L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.rollouts import Rollout, RolloutBatch, Score
from pegbox.types import ConfigSection

from pegbox_cosine_reward.config import CosineRewardConfig

if TYPE_CHECKING:
    from pegbox.context import Context


def cosine(tokens: int, max_tokens: int, shortest: float, longest: float) -> float:
    """From `shortest` at 0 tokens to `longest` at `max_tokens`, along half a cosine."""
    return longest + (shortest - longest) / 2 * (1 + math.cos(math.pi * tokens / max_tokens))


class CosineRewardPlugin:
    """Scores each completion whose source row has an answer to compare with."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=CosineRewardConfig)

    @hookimpl
    def score_rollouts(self, ctx: Context, rollouts: RolloutBatch) -> Sequence[Score]:
        config = ctx.section(CosineRewardConfig)
        decode = ctx.processor.tokenizer.decode

        def reward(rollout: Rollout) -> float | None:
            answer, tokens = rollout.columns.get(config.answer_column), len(rollout.completion)
            if answer is None:
                return None
            if not rollout.finished or tokens >= config.max_tokens:
                return config.cut_off
            text = decode(rollout.completion, skip_special_tokens=True)
            right = text.strip().endswith(str(answer))
            return cosine(tokens, config.max_tokens, *(config.right if right else config.wrong))

        return [Score(name="cosine-reward", values_R=tuple(map(reward, rollouts.rollouts)))]
