"""The plugin keeps the contract of plugins, losses and wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pegbox.context import Context
from pegbox.rows import UNTRAINED, Batch, Example, Extra
from pegbox.testing import LossConformance, PluginConformance, WrapperConformance
from pegbox.testing.tiny import TinyExamples, plain_model, tiny_batches


class TestGrpo(PluginConformance):
    plugin = "grpo"


class Prompts:
    """A source of prompts that has none (`pegbox.rows.RowSource`)."""

    total_steps, max_steps = 3, 3

    def __init__(self) -> None:
        self.examples = TinyExamples(["one", "two"])

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        return iter(())

    def take(self) -> Sequence[tuple[int, Example]]:
        return []

    def lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        return []

    def describe(self, batch: Batch) -> str:
        return "nothing"

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing."""


class Untrained(TinyExamples):
    """Rows that are prompts."""

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return replace(example, labels=[UNTRAINED] * len(example.input_ids))


class TestWrapper(WrapperConformance):
    plugin = "grpo"

    def result(self, hook: str) -> Any:
        return Untrained(["one", "two"]) if hook == "build_dataset" else Prompts()

    def arguments(self, ctx: Context) -> dict[str, Any]:
        model = plain_model(placed=True)
        return {"ctx": ctx, "split": "train", "model": model, "dataset": Prompts().examples}


def rollout_batches() -> list[Batch]:
    """Batches of random rows with random advantages and log-probabilities."""
    made, source = [], torch.Generator().manual_seed(3)
    for batch in tiny_batches():
        tokens = batch.trained_tokens
        near_N = -5.5 + torch.rand(tokens, generator=source)
        extra = {
            "advantages": Extra(value=torch.randn(len(batch.last_D), generator=source), layout="document"),
            "old_logps": Extra(value=near_N, layout="trained"),
            "sampler_logps": Extra(value=near_N + 0.1, layout="trained"),
            "reference_logps": Extra(value=near_N - 0.2, layout="trained"),
            "kept_tokens": Extra(value=torch.rand(tokens, generator=source) < 0.7, layout="trained"),
        }
        made.append(replace(batch, extra=extra))
    return made


class Loss(LossConformance):
    """Every kind of loss, with all that can be added to it."""

    plugin = "grpo"
    all: ClassVar[Mapping[str, Any]] = {
        "beta": 0.1,
        "entropy_coef": 0.01,
        "importance_sampling_correction": "token_truncate",
        "off_policy_mask_threshold": 0.2,
    }

    def batches(self) -> Sequence[Batch]:
        return rollout_batches()


class TestDapo(Loss):
    config = {**Loss.all}  # noqa: RUF012


class TestGrpoLoss(Loss):
    config = {**Loss.all, "loss_type": "grpo", "importance_sampling_level": "sequence"}  # noqa: RUF012


class TestDrGrpo(Loss):
    config = {**Loss.all, "loss_type": "dr_grpo", "delta": 1.5}  # noqa: RUF012


class TestLuspo(Loss):
    config = {**Loss.all, "loss_type": "luspo", "importance_sampling_level": "sequence"}  # noqa: RUF012


class TestCispo(Loss):
    config = {**Loss.all, "loss_type": "cispo"}  # noqa: RUF012


class TestSapo(Loss):
    config = {**Loss.all, "loss_type": "sapo", "kl_estimator": "k2"}  # noqa: RUF012


class TestVespo(Loss):
    config = {**Loss.all, "loss_type": "vespo"}  # noqa: RUF012


class TestRloo(Loss):
    config = {"loss_type": "rloo", "advantage": "rloo", "scale_rewards": "none"}  # noqa: RUF012


del Loss
