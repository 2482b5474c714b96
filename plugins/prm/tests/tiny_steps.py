"""Answers in steps with verdicts, made of random tokens."""

from __future__ import annotations

import random

from pegbox.rows import UNTRAINED, Example

SEPARATOR = 10


class Steps:
    """Answers in steps (`pegbox.rows.Examples`): a step is right if it is made of low tokens."""

    def __init__(self, split: str, rows: int = 12, last_only: bool = False) -> None:
        self.split, self.fingerprint, self._last_only = split, f"steps-{split}-{rows}", last_only
        self._rows = [self._row(random.Random(f"{split}/{at}")) for at in range(rows)]

    def _row(self, source: random.Random) -> Example:
        ids = [source.randint(100, 200) for _ in range(source.randint(2, 6))]
        labels = [UNTRAINED] * len(ids)
        verdicts = [source.random() < 0.5 for _ in range(source.randint(1, 4))]
        for number, right in enumerate(verdicts, 1):
            step = source.choices(range(20, 24) if right else range(60, 64), k=source.randint(1, 5))
            marked = number == len(verdicts) or not self._last_only
            ids += [*step, SEPARATOR]
            labels += [*[UNTRAINED] * len(step), SEPARATOR if marked else UNTRAINED]
        return Example(input_ids=ids, labels=labels, columns={"labels": verdicts[-1:] if self._last_only else verdicts})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def describe(self, index: int) -> str:
        return f"{self.split}.jsonl:{index + 1}"
