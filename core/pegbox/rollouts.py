"""What the hooks of reinforcement learning pass: requests, completions, scores, weight updates, and their receipts.

A rollout carries the first and the last weight version it was sampled with, and the columns of its source row. R stands
for rollouts in the suffix of a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pegbox.record import Json, Record
from pegbox.rows import Split

if TYPE_CHECKING:
    from torch import Tensor


class Sampling(Record):
    """How completions are sampled.

    Attributes:
        max_tokens: new tokens at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: 0 means all. `min_p`: the share of the likeliest token's probability that a token must have.
        stop, stop_ids: texts and token ids that end a completion; the end-of-turn tokens of the model always do.
        seed: sampling is a function of it, the prompt's place in the request and the weights; None: of the engine.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None


class RolloutRequest(Record):
    """Prompts as token ids with the columns of their source rows; `samples` completions are wanted of each.

    Every rank makes the same request and gets all rollouts of it.
    """

    prompts: tuple[tuple[int, ...], ...]
    columns: tuple[Mapping[str, Json], ...]
    samples: int
    sampling: Sampling
    split: Split = "train"


class Rollout(Record):
    """One completion.

    Attributes:
        completion: token ids, the one that ended it included.
        logps: the sampler's log-probability of each completion token, under the temperature it sampled with. Whether
            what filters (top-k, top-p, min-p) and penalties did is in it, is for the engine to say.
        first_version, last_version: weights that its first and its last token were sampled with.
        finished: it ended by itself, not because it was cut at `max_tokens`.
        trained: for each completion token whether it is the model's own (False: a tool's or environment's); empty: all.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    logps: tuple[float, ...]
    first_version: int
    last_version: int
    finished: bool
    trained: tuple[bool, ...] = ()
    columns: Mapping[str, Json] = field(default_factory=dict)


class RolloutBatch(Record):
    """Completions in the order of the request: all samples of the first prompt, then of the second."""

    rollouts: tuple[Rollout, ...]
    samples: int


class Score(Record):
    """One named reward for each rollout, in order; None where it does not apply."""

    name: str
    values_R: tuple[float | None, ...]


class WeightUpdate(Record):
    """New weights for engines: a version, what it holds, and the tensors by name, produced once."""

    version: int
    kind: Literal["adapter", "full"]
    tensors: Iterable[tuple[str, Tensor]]
    folder: Path | None = None


class SyncReceipt(Record):
    """Proof from one engine that it holds `version`; `evidence` says how it was established."""

    engine: str
    version: int
    evidence: str
