"""Scored completions as rows of a batch, and back: what is learnt from, on every rank, in one order.

Every rank holds all trajectories of a generation. `examples_of` gives them to the owner of batches to be laid out, and
`with_rollouts` puts what belongs to each trained token beside it: a batch says by position which trajectories it holds
(`Batch.rows`), its trained tokens stand in their order, and each trajectory's in the order of its text.

    N  trained tokens of a micro-batch    D  its completions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pegbox.errors import DataError
from pegbox.rollouts import Rollout
from pegbox.rows import UNTRAINED, Batch, Example, Extra

from pegbox_grpo.names import ADVANTAGES, KEPT, OLD_LOGPS, SAMPLER_LOGPS


@dataclass(frozen=True)
class Trajectory:
    """One completion and what was found about it; plain data, as checkpoints hold it.

    Attributes:
        row: number of the prompt's row in the data, for messages.
        trained: for each completion token whether it is learnt from.
        sampler_logps: one for each completion token; none: the sampler gave none.
        old_logps, kept: one for each trained token; none: not needed.
    """

    row: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    trained: tuple[bool, ...]
    sampler_logps: tuple[float, ...]
    advantage: float = 0.0
    old_logps: tuple[float, ...] = ()
    kept: tuple[bool, ...] = ()

    @classmethod
    def of(cls, row: int, rollout: Rollout, *, mask_truncated: bool) -> Trajectory:
        """A rollout; with `mask_truncated` one that was cut is not learnt from."""
        trained = rollout.trained or (True,) * len(rollout.completion)
        if mask_truncated and not rollout.finished:
            trained = (False,) * len(trained)
        prompt, completion = tuple(map(int, rollout.prompt)), tuple(map(int, rollout.completion))
        return cls(row, prompt, completion, tuple(map(bool, trained)), tuple(map(float, rollout.logps)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Trajectory:
        made: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in saved.items()}
        return cls(**made)

    def of_trained(self, values: Sequence[float]) -> list[float]:
        """The values of trained tokens, of one for each completion token."""
        return [value for value, trained in zip(values, self.trained, strict=True) if trained]


def examples_of(trajectories: Sequence[Trajectory]) -> list[Example]:
    """Rows of prompt and completion; the labels are the completion's trained tokens."""
    return [
        Example(
            input_ids=[*one.prompt, *one.completion],
            labels=[
                *[UNTRAINED] * len(one.prompt),
                *[token if trained else UNTRAINED for token, trained in zip(one.completion, one.trained, strict=True)],
            ],
        )
        for one in trajectories
    ]


def with_rollouts(batch: Batch, trajectories: Sequence[Trajectory]) -> Batch:
    """A batch laid out from `trajectories`, with what the loss needs of them; `rows` become rows of the data."""
    held = [trajectories[at] for at in batch.rows]
    _require_order(batch, held)
    advantages_D = torch.tensor([one.advantage for one in held], dtype=torch.float32)
    extra = {ADVANTAGES: Extra(value=advantages_D, layout="document")}
    if all(one.sampler_logps for one in trajectories if one.completion):
        extra[SAMPLER_LOGPS] = _of_tokens([one.of_trained(one.sampler_logps) for one in held])
    if any(one.old_logps for one in trajectories):
        extra[OLD_LOGPS] = _of_tokens([one.old_logps for one in held])
    if any(one.kept for one in trajectories):
        extra[KEPT] = _of_tokens([one.kept for one in held], torch.bool)
    pinned = batch.input_ids_BT.is_pinned()
    extra = {name: replace(one, value=one.value.pin_memory()) if pinned else one for name, one in extra.items()}
    return replace(batch, rows=tuple(one.row for one in held), extra={**batch.extra, **extra})


def _of_tokens(values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> Extra:
    joined = torch.tensor([value for one in values for value in one], dtype=dtype)
    return Extra(value=joined, layout="trained")


def by_trajectory(batch: Batch, values_N: torch.Tensor) -> dict[int, list[float]]:
    """Values of trained tokens by the position of their trajectory, of a batch whose `rows` are positions."""
    assert batch.document_N is not None, "the owner of batches sets it"
    counts = torch.bincount(batch.document_N, minlength=len(batch.rows)).tolist()
    parts = values_N.cpu().split(counts)
    return {at: part.tolist() for at, part in zip(batch.rows, parts, strict=True)}


def _require_order(batch: Batch, held: Sequence[Trajectory]) -> None:
    """Refuse a layout in which trained tokens would get what belongs to others."""
    assert batch.document_N is not None, "the owner of batches sets it"
    expected = [token for one in held for token in one.of_trained(one.completion)]
    got = batch.targets_BT.flatten()[batch.trained_N]
    documents = torch.bincount(batch.document_N, minlength=len(held)).tolist()
    if documents != [sum(one.trained) for one in held] or got.tolist() != expected:
        raise DataError(
            f"a batch of rollouts has {len(got)} trained tokens, the completions in it have {len(expected)}",
            "Each trained token gets the advantage and log-probabilities of its completion, in their order.",
            "Fix the plugin that lays out batches: documents stand in the order of Batch.rows.",
        )
