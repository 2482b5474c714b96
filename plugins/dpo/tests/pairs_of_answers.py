"""Pairs of answers as examples and batches, and a plugin that brings them as a dataset."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pegbox.hooks import hookimpl
from pegbox.rows import UNTRAINED, Batch, Example, Examples, Extra, Split
from pegbox.testing.tiny import collate

SHAPES = ((3, 5, 2), (2, 1, 6), (4, 3, 3), (1, 7, 4), (5, 2, 1), (2, 4, 8))
"""Tokens of the prompt, of the chosen and of the rejected answer."""


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Example:
    """A preference as one row of two documents."""
    ids = [*prompt, *chosen, *prompt, *rejected]
    untrained = [UNTRAINED] * len(prompt)
    return Example(
        input_ids=ids,
        labels=[*untrained, *chosen, *untrained, *rejected],
        documents=(len(prompt) + len(chosen), len(prompt) + len(rejected)),
        signs=(1, -1),
    )


def some_pairs(count: int = 4, seed: int = 0, vocabulary: int = 250) -> list[tuple[list[int], list[int], list[int]]]:
    """Random prompts, chosen and rejected answers of different lengths, as token ids."""
    source = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [source.randrange(1, vocabulary) for _ in range(length)]

    return [tuple(ids(length) for length in SHAPES[at % len(SHAPES)]) for at in range(count)]  # type: ignore[misc]


def padded(examples: Sequence[Example], reference: bool = True) -> Batch:
    """One padded batch, each answer a line, with made-up log-probabilities of a reference."""
    import torch

    lines = []
    for example in examples:
        cut = example.documents[0]
        for part, sign in ((slice(None, cut), 1), (slice(cut, None), -1)):
            lines.append(Example(input_ids=example.input_ids[part], labels=example.labels[part], signs=(sign,)))
    batch = collate(lines, tuple(range(len(examples))))
    if not reference:
        return batch
    logps_N = -5 - torch.rand(len(batch.trained_N), generator=torch.Generator().manual_seed(3))
    return replace(batch, extra={"reference_logps": Extra(value=logps_N, layout="trained")})


class PairRows:
    """Pairs as rows of a split (`pegbox.rows.Examples`)."""

    def __init__(self, examples: Sequence[Example], split: Split = "train") -> None:
        self.split, self.fingerprint, self._examples = split, f"{len(examples)}-{split}", examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def describe(self, index: int) -> str:
        return f"pair {index}"


class Pairs:
    """Owns `build_dataset`."""

    def __init__(self, train: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        self.rows = {"train": train, "eval": held_out}

    @hookimpl
    def build_dataset(self, split: Split) -> Examples | None:
        return PairRows(self.rows[split], split) if self.rows[split] else None
