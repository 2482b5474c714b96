"""`completions.jsonl` in the run's folder: what was asked, what was answered, and what it was worth.

One JSON object for each completion that is kept: split, step, prompt, completion, finished, rewards by name, advantage.
A run that is resumed cuts off what the lost steps wrote.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox_grpo.scoring import text_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Split

    from pegbox_grpo.collecting import Collected

NAME = "completions.jsonl"


@dataclass(frozen=True)
class CompletionsFile:
    """Written by the first rank."""

    ctx: Context
    kept: int

    def append(self, collected: Collected, step: int, split: Split) -> None:
        """Write the first completions of a generation that was made after `step` optimizer steps."""
        if self.ctx.runtime.rank or not self.kept:
            return
        self.ctx.folder.mkdir(parents=True, exist_ok=True)
        with (self.ctx.folder / NAME).open("a", encoding="utf-8") as file:
            for at, rollout in enumerate(collected.rollouts[: self.kept]):
                record = {
                    "split": split,
                    "step": step,
                    "prompt": text_of(self.ctx, rollout.prompt),
                    "completion": text_of(self.ctx, rollout.completion),
                    "finished": rollout.finished,
                    "rewards": collected.rewards.of(at),
                    "advantage": collected.trajectories[at].advantage,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def size(self) -> int:
        """Bytes written so far: the end of the last record."""
        path = self.ctx.folder / NAME
        return path.stat().st_size if path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop the records that follow."""
        if self.ctx.runtime.rank == 0 and self.size() > size:
            os.truncate(self.ctx.folder / NAME, size)
