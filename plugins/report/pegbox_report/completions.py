"""`completions.jsonl` of an online run: of some generations the completions with the highest and the lowest reward.

What a policy is paid for is seen in the best ones, what it does not reach in the worst. The file is read line by line;
of each generation only these stay in memory, their texts cut to what the page shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_GENERATIONS = 8
"""Of each split; the first and the last are among them."""
EACH = 2
"""Best ones of a generation, and worst ones."""
LONGEST = 4000
"""Characters of a text on the page."""


@dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        step: optimizer steps before it was sampled.
        reward: sum of its rewards times their weights; those that do not apply are left out.
        finished: it ended by itself.
    """

    split: str
    step: int
    prompt: str
    text: str
    finished: bool
    rewards: Mapping[str, float | None]
    reward: float
    advantage: float | None


def read_completions(file: Path, weights: Mapping[str, float]) -> list[Completion]:
    """The best and the worst of some generations, best first in each; none if there is no file."""
    generations: dict[tuple[str, int], list[Completion]] = {}
    for record in _records(file):
        one = _completion(record, weights)
        held = generations.setdefault((one.split, one.step), [])
        held.append(one)
        if len(held) > 2 * EACH:
            held.sort(key=lambda other: -other.reward)
            del held[EACH]  # neither among the best nor among the worst
    found: list[Completion] = []
    for split in dict.fromkeys(split for split, _ in generations):
        for step in _spread(sorted(step for other, step in generations if other == split)):
            found += sorted(generations[split, step], key=lambda one: -one.reward)
    return found


def weights_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Weights of rewards by name, as the run's config has them."""
    return {
        str(entry["key"]).removeprefix("rewards."): float(entry["value"])
        for entry in record.get("plan", {}).get("config", ())
        if str(entry["key"]).startswith("rewards.")
    }


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off: the run was killed while it wrote
            if isinstance(record, dict):
                yield record


def _completion(record: Mapping[str, Any], weights: Mapping[str, float]) -> Completion:
    rewards = dict(record.get("rewards") or {})
    return Completion(
        split=str(record.get("split", "train")),
        step=int(record.get("step", 0)),
        prompt=_cut(record.get("prompt")),
        text=_cut(record.get("completion")),
        finished=bool(record.get("finished", True)),
        rewards=rewards,
        reward=sum(weights.get(name, 1.0) * value for name, value in rewards.items() if value is not None),
        advantage=record.get("advantage"),
    )


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]} … ({left:,} more characters)"


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `MOST_GENERATIONS` of them, evenly, with both ends."""
    last = len(steps) - 1
    if last < MOST_GENERATIONS:
        return list(steps)
    return [steps[round(at * last / (MOST_GENERATIONS - 1))] for at in range(MOST_GENERATIONS)]
