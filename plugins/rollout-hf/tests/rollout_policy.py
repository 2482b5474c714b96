"""A tiny policy, an engine that samples with it, and requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pegbox.rollouts import RolloutBatch, RolloutRequest, Sampling
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import tiny_model, tiny_processor
from pegbox.types import Model
from pegbox_rollout_hf.config import RolloutHfConfig
from pegbox_rollout_hf.engine import Engine

PROMPTS = (tuple(b"2+2="), tuple(b"a longer prompt than the first"), tuple(b"x"), tuple(b"the capital of"))


def policy() -> Model:
    """A tiny Llama of random weights, large enough that its distributions are far from flat."""
    made = tiny_model()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in made.module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    made.module.generation_config.eos_token_id = None
    return made


def engine(model: Model, runtime: Any = None, **settings: Any) -> Engine:
    return Engine(RolloutHfConfig(**settings), model, tiny_processor(), runtime or FakeRuntime())


def request(samples: int = 1, prompts: Sequence[Sequence[int]] = PROMPTS, **sampling: Any) -> RolloutRequest:
    return RolloutRequest(
        prompts=tuple(map(tuple, prompts)),
        columns=tuple({"row": index} for index in range(len(prompts))),
        samples=samples,
        sampling=Sampling(**{"max_tokens": 12, **sampling}),
    )


def completions(batch: RolloutBatch) -> list[tuple[int, ...]]:
    return [rollout.completion for rollout in batch.rollouts]


def chi_square_z(p_V: torch.Tensor, tokens: Sequence[int]) -> float:
    """How far drawn tokens are from their probabilities: Pearson's statistic as a normal deviate (Wilson, Hilferty).

    That of a right sampler is beyond 3.9 once in 10,000 seeds. Tokens that are expected less than five times are one.
    """
    expected_V = p_V * len(tokens)
    seen_V = torch.bincount(torch.tensor(list(tokens)), minlength=len(p_V)).double()
    often = expected_V >= 5
    expected = torch.cat([expected_V[often], expected_V[~often].sum()[None]])
    seen = torch.cat([seen_V[often], seen_V[~often].sum()[None]])
    freedom = len(expected) - 1
    assert freedom > 5
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
