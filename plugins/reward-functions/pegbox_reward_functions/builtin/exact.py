"""The reward `exact`: the completion, or a part of it, is the row's answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pegbox.section import Section, setting

from pegbox_reward_functions.builtin.said import inside, last_number, text_of

ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
PUNCTUATION = re.compile(r"[^\w\s]")


class ExactOptions(Section):
    """Options of the reward `exact`."""

    answer: str = setting("answer", "Column with the right answer, or with a list of right ones.", min_length=1)
    part: Literal["all", "last_line", "last_number"] = setting(
        "all", "Which part of the completion is its answer; of the text inside `tag`, if that is set."
    )
    tag: str | None = setting(None, "The answer stands in the last <tag>...</tag>; without one it is wrong.")
    ignore: tuple[Literal["case", "space", "punctuation", "articles"], ...] = setting(
        ("space",), "Differences that do not count: upper case, runs of blanks, marks, the words a, an and the."
    )
    right: float = setting(1.0, "Reward of a right answer.")
    wrong: float = setting(0.0, "Reward of a wrong one.")


class Exact:
    """Compares texts."""

    options = ExactOptions

    def open(self, options: ExactOptions) -> Callable[..., list[float | None]]:
        def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
            return [
                _reward(options, text_of(completion), answer)
                for completion, answer in zip(completions, columns[options.answer], strict=True)
            ]

        score.columns = (options.answer,)  # type: ignore[attr-defined]
        return score


def _reward(options: ExactOptions, text: str, answer: Any) -> float | None:
    if answer is None:
        return None
    several = isinstance(answer, Sequence) and not isinstance(answer, str)
    right = {normalized(str(one), options.ignore) for one in (answer if several else [answer])}
    said = _said(options, text)
    return options.right if said is not None and normalized(said, options.ignore) in right else options.wrong


def _said(options: ExactOptions, text: str) -> str | None:
    part = inside(text, options.tag) if options.tag is not None else text
    if part is None or options.part == "all":
        return part
    if options.part == "last_number":
        return last_number(part)
    return next((line for line in reversed(part.splitlines()) if line.strip()), "")


def normalized(text: str, ignore: Sequence[str]) -> str:
    """A text without the differences that do not count."""
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = PUNCTUATION.sub("", text)
    if "articles" in ignore:
        text = ARTICLES.sub(" ", text)
    return " ".join(text.split()) if "space" in ignore else text


exact: Exact = Exact()
