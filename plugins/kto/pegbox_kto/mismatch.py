"""Prompts with answers of other rows: what the divergence of policy and reference is estimated on.

The divergence is an expectation over answers that the policy would give; answers of other prompts of the same step
stand in for them (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1). Row i gets the answers of row i - 1, so that
the answers are those of the step, each once, as long as its rows have equally many.

A document is a prompt and an answer: the answer begins with the first trained token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy
from numpy.typing import NDArray
from pegbox.rows import UNTRAINED, Example

Integers = NDArray[numpy.integer]
Tokens = tuple[Integers, Integers]
"""Ids and labels, equally many."""


def mismatched(rows: Sequence[Example], before: Example) -> list[Example]:
    """The prompts of rows with the answers of the row before each, one example of one document for each document.

    A document longer than the longest one of `rows` and `before` loses the end of its answer: it fits wherever they
    do, into a bin as into the model's context.

    Args:
        rows: rows whose prompts are taken.
        before: the row before the first.
    """
    split = [list(_documents(row)) for row in (before, *rows)]
    longest = max(len(prompt[0]) + len(answer[0]) for documents in split for prompt, answer in documents)
    made = []
    for others, own in pairwise(split):
        for at, (prompt, _) in enumerate(own):
            answer = others[at % len(others)][1]
            ids, labels = (numpy.concatenate(parts)[:longest] for parts in zip(prompt, answer, strict=True))
            made.append(Example(input_ids=ids, labels=labels, signs=(0,)))  # type: ignore[arg-type]
    return made


def _documents(row: Example) -> Iterator[tuple[Tokens, Tokens]]:
    """Prompt and answer of each document of a row."""
    ids, labels = numpy.asarray(row.input_ids), numpy.asarray(row.labels)
    for start, end in pairwise(accumulate(row.documents or (len(ids),), initial=0)):
        trained = numpy.flatnonzero(labels[start + 1 : end] != UNTRAINED)
        answer = start + 1 + int(trained[0]) if len(trained) else end
        prompt = (ids[start:answer], numpy.full(answer - start, UNTRAINED))
        yield prompt, (ids[answer:end], labels[answer:end])
