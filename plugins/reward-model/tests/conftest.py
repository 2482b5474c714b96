"""Reward models on disk, and the plugin asked for their scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.rollouts import Rollout, RolloutBatch, Score
from pegbox.testing.runtime import FakeRuntime
from pegbox.types import Processor
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from tiny_judges import judge, tokenizer_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def own() -> PreTrainedTokenizerFast:
    """The policy's tokenizer."""
    return tokenizer_of("the sum of one and two is three, and three and one is four")


@pytest.fixture
def helpful(tmp_path: Path, own: PreTrainedTokenizerFast) -> Path:
    """A reward model with the policy's tokenizer."""
    own.save_pretrained(judge(tmp_path / "helpful"))
    return tmp_path / "helpful"


@pytest.fixture
def context(tmp_path: Path, own: PreTrainedTokenizerFast) -> Callable[..., Context]:
    """A run that has begun: `context({"name": ...}, prompt="messages")`."""

    def make(*models: dict[str, Any], policy: PreTrainedTokenizerFast | None = None, **section: Any) -> Context:
        config = {
            "model": {"name": str(tmp_path)},
            "plugins": ["hf", "trainer", "reward-model"],
            "output": str(tmp_path / "run"),
            "reward-model": {"models": list(models), **section},
        }
        ctx = compose(config)
        ctx.runtime = FakeRuntime()
        ctx.processor = Processor(tokenizer=policy or own, pad_id=0, fingerprint="")
        return ctx

    return make


@pytest.fixture
def scores(context: Callable[..., Context]) -> Callable[..., list[Score]]:
    """What the models say: `scores(rollouts, {"name": ...})`."""

    def ask(rollouts: Sequence[Rollout], *models: dict[str, Any], **options: Any) -> list[Score]:
        ctx = context(*models, **options)
        batch = RolloutBatch(rollouts=tuple(rollouts), samples=1)
        return [score for _, answers in ctx.each(hooks.score_rollouts, ctx, batch) for score in answers]

    return ask
