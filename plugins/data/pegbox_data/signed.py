"""Answers as rows: their documents joined to one row, or rows of their own; and what is unusual about a pair.

The two answers of a preference must follow the same prompt, or their difference says nothing about the answers. What
comes before the first character that is trained in one of them is compared, and then its tokens, which the characters
of an answer may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pegbox_data.encoding import Encoded
from pegbox_data.findings import Found
from pegbox_data.turns import common

if TYPE_CHECKING:
    from pegbox_data.encoding import Encoder
    from pegbox_data.formats import Answers, Rendered

NAMES = {1: "chosen", -1: "rejected"}
"""What messages call an answer by its sign."""


class Signed(NamedTuple):
    """A row with signs: its tokens, the lengths of its documents with their signs, and what was found."""

    encoded: Encoded
    documents: tuple[int, ...]
    signs: tuple[int, ...]
    found: list[Found]


def signed_rows(answers: Answers, encoded: Sequence[Encoded], encoder: Encoder) -> Iterator[Signed]:
    """The rows that answers to one prompt become."""
    texts, signs = answers.texts, tuple(answers.signs)
    found = [encoder.audit(text, one) for text, one in zip(texts, encoded, strict=True)]
    named = [
        [Found(one.id, f"{NAMES.get(sign, sign)}: {one.detail}" if one.detail else "") for one in own]
        for own, sign in zip(found, signs, strict=True)
    ]
    if answers.apart:
        for one, sign, own in zip(encoded, signs, named, strict=True):
            yield Signed(one, (len(one.ids),), (sign,), own)
        return
    together = [one for own in named for one in own]
    if len(texts) > 1:
        together += _compared(texts, encoded)
    joined = Encoded(
        np.concatenate([one.ids for one in encoded]),
        np.concatenate([one.trained for one in encoded]),
        sum(one.border_tokens for one in encoded),
    )
    yield Signed(joined, tuple(len(one.ids) for one in encoded), signs, together)


def _compared(texts: Sequence[Rendered], encoded: Sequence[Encoded]) -> Iterator[Found]:
    """What is unusual about answers that belong together."""
    first, *others = encoded
    if any(np.array_equal(first.ids, one.ids) for one in others):
        yield Found("equal-answers")
        return
    starts = [text.spans[0].start for text in texts if text.spans]
    if len(starts) == len(texts):
        prompts = [text.text[: min(starts)] for text in texts]
        if any(prompt != prompts[0] for prompt in prompts):
            at = min(common(prompts[0], prompt) for prompt in prompts)
            seen = " and ".join(repr(prompt[at : at + 30]) for prompt in prompts)
            yield Found("unequal-prompts", f"after {at:,} characters the prompts go on with {seen}")
            return
    shared = min(int(np.argmax(one.trained)) if one.trained.any() else 0 for one in encoded)
    if any(not np.array_equal(first.ids[:shared], one.ids[:shared]) for one in others):
        yield Found("unequal-prompt-tokens")
