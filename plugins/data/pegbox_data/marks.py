"""Character ranges of a message that say for themselves whether they are trained.

They come from lists of parts, each with `train` or `weight`, and from `train_detail`, a list of ranges. Where neither
says anything, the decision for the whole message counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from pegbox.errors import DataError

TEXT = ("text", "content", "value")


class Mark(NamedTuple):
    """Characters [begin, end) of a message's `field` are trained or not."""

    field: str
    begin: int
    end: int
    train: bool


def joined(content: Any, field: str, number: int) -> tuple[str | None, tuple[Mark, ...]]:
    """A content as one string, and the marks of its parts."""
    if content is None or isinstance(content, str):
        return content, ()
    if not isinstance(content, list | tuple):
        raise DataError(
            f"message {number} has the {field} {_shown(content)}",
            "It is a string or a list of text parts.",
            "Correct it.",
        )
    pieces: list[str] = []
    marks: list[Mark] = []
    at = 0
    for part in content:
        text = _text(part, field, number)
        train = _train(part, number)
        if train is not None and text:
            marks.append(Mark(field, at, at + len(text), train))
        pieces.append(text)
        at += len(text)
    return "".join(pieces), tuple(marks)


def details(listed: Any, content: str, number: int) -> tuple[Mark, ...]:
    """The marks of a `train_detail`: ranges with `begin` and `end` (exclusive), or with `begin_offset` and
    `end_offset` (inclusive, as in Axolotl).
    """
    if listed is not None and not isinstance(listed, list | tuple):
        raise DataError(
            f"message {number} has train_detail: {_shown(listed)}",
            "It is a list of ranges.",
            "Write it as [{begin: 0, end: 5, train: false}].",
        )
    marks = [_detail(detail, len(content), number) for detail in listed or ()]
    marks.sort(key=lambda mark: mark.begin)
    for before, after in pairwise(marks):
        if after.begin < before.end:
            raise DataError(
                f"message {number} has overlapping ranges in train_detail: {before.begin}-{before.end} and "
                f"{after.begin}-{after.end}",
                "A character is trained or not.",
                "Make the ranges disjoint.",
            )
    return tuple(marks)


def _detail(detail: Any, length: int, number: int) -> Mark:
    inclusive = isinstance(detail, Mapping) and "begin_offset" in detail
    names = ("begin_offset", "end_offset") if inclusive else ("begin", "end")
    values: list[Any] = [detail.get(name) for name in names] if isinstance(detail, Mapping) else [None]
    if not all(type(value) is int for value in values) or not isinstance(detail.get("train"), bool):
        raise DataError(
            f"message {number} has the range {_shown(detail)} in train_detail",
            "A range has begin, end (exclusive) and train.",
            "Write it as {begin: 0, end: 5, train: false}.",
        )
    begin, end = values[0], values[1] + inclusive
    if not 0 <= begin < end <= length:
        raise DataError(
            f"message {number} has the range {_shown(detail)} in train_detail",
            f"Its content has {length} characters.",
            "Keep ranges inside the content.",
        )
    return Mark("content", begin, end, detail["train"])


def _text(part: Any, field: str, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = next((part[name] for name in TEXT if isinstance(part.get(name), str)), None) if kind == "text" else None
    if text is None:
        raise DataError(
            f"message {number} has the part {_shown(part)} in its {field}",
            "Parts are texts; images and audio need a processor for them.",
            "Write it as {type: text, text: ...}.",
        )
    return str(text)


def _train(part: Any, number: int) -> bool | None:
    if isinstance(part, str):
        return None
    train, weight = part.get("train"), part.get("weight")
    given = [value for value in (train, None if weight is None else bool(weight)) if value is not None]
    if any(type(value) is not bool for value in given) or weight not in (None, 0, 1) or len(set(given)) > 1:
        raise DataError(
            f"message {number} has a part with train: {_shown(train)} and weight: {_shown(weight)}",
            "A part is trained (train: true or weight: 1) or not (train: false or weight: 0).",
            "Keep one of the two.",
        )
    return given[0] if given else None


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
