"""The reward `reasoning-gym`: the task that made the row judges the answer (arXiv:2505.24760).

The column `entry` holds what the task made, as the source `reasoning-gym` writes it: JSON, with the task's name in its
metadata. Most tasks give 1 for the right answer, 0 for none, and something small for a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from pegbox.section import Section, setting

from pegbox_reward_functions.builtin.said import inside, last_number, text_of
from pegbox_reward_functions.gym_rows import library


class GymOptions(Section):
    """Options of the reward `reasoning-gym`."""

    entry: str = setting("entry", "Column with the task's entry: JSON, or a mapping.", min_length=1)
    tag: str | None = setting(None, "The answer stands in the last <tag>...</tag>; the whole completion if not set.")
    last_number: bool = setting(False, "The answer is the last number of the completion, or inside `tag`.")


class Gym:
    """Asks reasoning-gym."""

    options = GymOptions

    def open(self, options: GymOptions) -> Callable[..., list[float | None]]:
        gym = library()

        def reward(text: str, entry: Any) -> float | None:
            if entry is None:
                return None
            made = json.loads(entry) if isinstance(entry, str) else entry
            said = inside(text, options.tag) if options.tag is not None else text
            if said is not None and options.last_number:
                said = last_number(said)
            judge = gym.get_score_answer_fn(made["metadata"]["source_dataset"])
            return float(judge(said.strip() if said is not None else None, made))

        def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
            return [reward(text_of(one), entry) for one, entry in zip(completions, columns[options.entry], strict=True)]

        score.columns = (options.entry,)  # type: ignore[attr-defined]
        return score


gym = Gym()
