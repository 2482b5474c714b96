"""The reward `format`: the completion has the form that it should."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pegbox.section import Section, setting
from pydantic import model_validator

from pegbox_reward_functions.builtin.said import text_of


class FormatOptions(Section):
    """Options of the reward `format`."""

    tags: tuple[str, ...] = setting(
        ("think", "answer"), "The completion is <tag>...</tag> for each of these, in order, each once, nothing between."
    )
    pattern: str | None = setting(
        None, "In place of tags: a regular expression for the whole completion; dots match line ends."
    )
    partial: bool = setting(False, "Give a share for each tag that opens and closes once, instead of all or nothing.")
    right: float = setting(1.0, "Reward of the form.")
    wrong: float = setting(0.0, "Reward of any other.")

    @model_validator(mode="after")
    def _possible(self) -> FormatOptions:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from None
        if self.pattern is not None and self.partial:
            raise ValueError("partial counts tags, but pattern is set in place of them; remove one")
        if self.pattern is None and not self.tags:
            raise ValueError("tags is empty and pattern is not set; there is no form; set one")
        return self


class Form:
    """Looks at tags, or at a regular expression."""

    options = FormatOptions

    def open(self, options: FormatOptions) -> Callable[..., list[float | None]]:
        escaped = [re.escape(tag) for tag in options.tags]
        # No tag of the form may stand inside another part: <think> a <think> b </think> is not the form.
        inner = rf"(?:(?!</?(?:{'|'.join(escaped)})>).)*"
        of_tags = r"\s*" + r"\s*".join(f"<{tag}>{inner}</{tag}>" for tag in escaped) + r"\s*"
        whole = re.compile(options.pattern if options.pattern is not None else of_tags, re.DOTALL)

        def reward(text: str) -> float:
            if whole.fullmatch(text):
                return options.right
            if not options.partial:
                return options.wrong
            present = sum(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in options.tags)
            # All tags without the order is one short of the form.
            share = min(present, len(options.tags) - 1) / len(options.tags)
            return options.wrong + share * (options.right - options.wrong)

        def score(completions: Sequence[Any]) -> list[float | None]:
            return [reward(text_of(completion)) for completion in completions]

        return score


form = Form()
