"""Finds, in a rendered conversation, what the assistant would have had to generate: one range for each message.

By construction, in this order:

1. the template's `{% generation %}` blocks, where it says that they are exact;
2. prefixes: the template is rendered over messages[:i] with the generation prompt, and over messages[:i+1]. Both must
   be prefixes of the whole text; what lies between them is the turn, its end-of-turn token included;
3. for templates that rewrite history (they hide earlier thinking, or close the last turn differently): the template's
   blocks, or those of a built-in template that renders this very text;
4. the places of the contents (`borders`): the header before an answer and the footer behind it are read off renderings
   where it stands last, and must be what the text has around the answer.

What none of them can tell is refused: a wrong mask is worse than no run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pegbox.errors import DataError

from pegbox_data.borders import Borders, borders
from pegbox_data.template import ChatTemplate, RenderError, Talk

if TYPE_CHECKING:
    from pegbox_data.twins import Twins

Range = tuple[int, int]
PROBE = "x"
CLOSERS = (">", "]", "\n")
"""Headers end with one of these, whatever the template."""


class Turn(NamedTuple):
    """The trained part of one message, its end-of-turn token included: characters [start, end).

    `note` is the id of a finding.
    """

    start: int
    end: int
    note: str | None = None


class HistoryError(Exception):
    """A message is rendered differently when others follow it: `at` is the first character that differs."""

    def __init__(self, index: int, why: str, at: int = 0) -> None:
        super().__init__(why)
        self.index, self.why, self.at = index, why, at


@dataclass
class Rendering:
    """One conversation as text.

    Attributes:
        blocks: the ranges of the template's generation blocks; none if it has none.
        ends: special tokens, one of which ends a turn.
        twins: built-in templates that may render the same text.
    """

    template: ChatTemplate
    talk: Talk
    text: str
    blocks: Sequence[Range]
    ends: tuple[str, ...]
    twins: Twins | None = None
    _made: dict[tuple[int, bool], str] = field(default_factory=dict)

    @cached_property
    def spoken(self) -> dict[int, int]:
        """The number of each assistant's message among them, by message index."""
        found = [index for index, message in enumerate(self.talk.messages) if message["role"] == "assistant"]
        return {index: number for number, index in enumerate(found)}

    @cached_property
    def borders(self) -> Borders | None:
        """Where each content stands."""
        return borders(self.template, self.talk, self.text)

    def turn(self, index: int) -> Turn:
        """The trained part of one message. Raises `DataError` if it cannot be told for certain."""
        if self.template.exact and len(self.blocks) == len(self.spoken) and index in self.spoken:
            return self._whole(*self.blocks[self.spoken[index]])
        if self.twins is not None and self.twins.fitted and self._twin_blocks and index in self.spoken:
            return self._whole(*self._twin_blocks[self.spoken[index]])
        try:
            return self._by_prefix(index)
        except HistoryError as change:
            turn = self._by_blocks(index, change) or self._by_borders(index) or self._by_probe(index)
            if turn is None:
                raise self._refused(change) from change
            return turn

    def _whole(self, start: int, end: int) -> Turn:
        """A block with the whitespace behind its end-of-turn token, which tokenizers may join to it."""
        if self.text.endswith(self.ends, start, end):
            while self.text[end : end + 1].isspace():
                end += 1
        return Turn(start, end)

    def _by_prefix(self, index: int) -> Turn:
        start, end = self._start(index), len(self.text)
        if index + 1 < len(self.talk.messages):
            try:
                end = self._prefix(index + 1, prompt=False, index=index)
            except HistoryError as change:
                end = self._agreed_end(index, start, change)
        if end <= start:
            raise HistoryError(index, "the template leaves it out")
        return Turn(start, end)

    def _agreed_end(self, index: int, start: int, change: HistoryError) -> int:
        """Where a turn ends that is rendered alike with and without what follows it, up to its end-of-turn.

        Phi-3's template puts EOS after a conversation: the two renderings differ, but behind `<|end|>`.
        """
        end = start + self._last_end(self.text[start : change.at])
        after = self._content_end(self.borders, index)
        if after is None or not start < after <= end or not self.text[end].isspace():
            raise change
        return end

    def _last_end(self, text: str) -> int:
        """Where the last of the tokens that end a turn ends in `text`; 0 if there is none."""
        return max((text.rfind(token) + len(token) for token in self.ends if token in text), default=0)

    def _start(self, index: int) -> int:
        generated = self.talk.messages[index]["role"] == "assistant"
        if index:
            return self._prefix(index, prompt=generated, index=index)
        return self._opening() if generated else 0

    def _first(self, count: int, prompt: bool) -> str:
        """The rendering of the first messages; each is made once."""
        key = (count, prompt)
        if key not in self._made:
            self._made[key] = self.template.render(self.talk.first(count), prompt)
        return self._made[key]

    def _prefix(self, count: int, *, prompt: bool, index: int) -> int:
        """The length of a rendering of the first messages that must be a prefix of the text."""
        try:
            prefix = self._first(count, prompt)
        except RenderError as error:
            raise HistoryError(index, f"it cannot be rendered alone: {error}") from error
        if self.text.startswith(prefix):
            return len(prefix)
        at = common(prefix, self.text)
        when = "when the answer is to be generated" if prompt else "when no message follows"
        raise HistoryError(
            index,
            f"{when} the text goes on with {_cut(prefix, at)}, in the conversation with {_cut(self.text, at)}",
            at,
        )

    def _opening(self) -> int:
        """Where the content of an assistant's message begins that no other precedes.

        Templates seldom render an empty conversation as a prefix of one that the assistant opens. So the
        message is rendered with two contents that differ in their first character: up to there lies what is
        not its own.
        """
        message = self.talk.messages[0]
        try:
            first, second = (
                self.template.render(self.talk._replace(messages=[{**message, "content": probe}])) for probe in "01"
            )
        except RenderError as error:
            raise HistoryError(0, f"it cannot be rendered alone: {error}") from error
        start = common(first, second)
        if not self.text.startswith(first[:start]):
            raise HistoryError(0, "what stands before it depends on what follows it")
        return start

    def _by_blocks(self, index: int, change: HistoryError) -> Turn | None:
        """The turn by generation blocks: those of the template, or of a twin that renders the same text."""
        if index not in self.spoken:
            return None
        if len(self.blocks) == len(self.spoken):
            start, end = self.blocks[self.spoken[index]]
            # Some templates put the header into the block; the generation prompt gives it to the model.
            told = self._told_start(index)
            return Turn(max(start, told) if told is not None and told < end else start, end, "rewritten-history")
        if self._twin_blocks:
            return self._whole(*self._twin_blocks[self.spoken[index]])
        return None

    @cached_property
    def _twin_blocks(self) -> Sequence[Range]:
        return self.twins.blocks(self.talk, self.text, len(self.spoken)) if self.twins is not None else ()

    def _by_borders(self, index: int) -> Turn | None:
        """The turn by the places of contents, for templates that rewrite history."""
        if index not in self.spoken or not self.borders:
            return None
        start, after = self._told_start(index), self._content_end(self.borders, index)
        if start is None or after is None:
            return None
        own = [place for place in self._places(self.borders, index) if place is not None]
        bounded = min([start, *own])
        end = len(self.text) if index + 1 == len(self.talk.messages) else self._told_end(index, after)
        if end is None or not bounded <= after <= end:
            return None
        return Turn(bounded, end, "rewritten-history" if self._asked(index) else "prompt-differs")

    def _by_probe(self, index: int) -> Turn | None:
        """The turn of an empty answer: of one with a single letter, if that letter is all that it changes."""
        message = self.talk.messages[index]
        if message.get("content") != "" or message.get("tool_calls") or message["role"] != "assistant":
            return None
        filled = [*self.talk.messages[:index], {**message, "content": PROBE}, *self.talk.messages[index + 1 :]]
        talk = self.talk._replace(messages=filled)
        try:
            text = self.template.render(talk)
            probed = Rendering(self.template, talk, text, (), self.ends, self.twins)
            place = (probed.borders or {}).get((index, "content"))
            if place is None or place.start is None or text[: place.start] + text[place.start + 1 :] != self.text:
                return None
            start, end, note = probed.turn(index)
        except (RenderError, DataError):
            return None
        return Turn(start, end - 1, note) if start <= place.start < end else None

    def _asked(self, index: int) -> bool:
        """Whether the answer begins as the generation prompt asks."""
        tail, after = self._prompt_tail(index)
        return self.text.startswith(tail, after) if tail is not None else False

    def _told_start(self, index: int) -> int | None:
        """Where an answer begins: after what the text shares with the generation prompt behind the message before."""
        if not index:
            return None
        tail, after = self._prompt_tail(index)
        if tail is None:
            return None
        shared = common(tail, self.text[after : after + len(tail)])
        if shared == len(tail):
            return after + shared
        # Where the prompt goes on in its own way, the two may share a letter or two of different tags by chance.
        whole = max(tail.rfind(closer, 0, shared) for closer in CLOSERS)
        return after + whole + 1 if whole >= 0 else None

    def _prompt_tail(self, index: int) -> tuple[str | None, int]:
        """What the generation prompt puts behind the message before an answer, and where that is in the text."""
        talk = self.talk.first(index)
        try:
            prompt = self._first(index, prompt=True)
        except RenderError:
            return None, 0
        if self.text.startswith(prompt):
            return "", len(prompt)
        there, here = borders(self.template, talk, prompt, prompt=True), self.borders
        before = self._content_end(there, index - 1), self._content_end(here, index - 1)
        if before[0] is None or before[1] is None:
            return None, 0
        return prompt[before[0] :], before[1]

    def _told_end(self, index: int, after: int) -> int | None:
        """Where a turn ends whose content ends at `after`: by the header that the next message has when this one is
        left out, or by the footer that this one has when no message follows.
        """
        following = (self.borders or {}).get((index + 1, "content"))
        roles = (self.talk.messages[index]["role"], self.talk.messages[index + 1]["role"])
        gap = None if following is None or following.start is None else (*roles, self.text[after : following.start])
        if gap in self.template.gaps:
            return after + self.template.gaps[gap]
        known = self._end_by_header(index, after)
        if known is not None:
            if gap is not None:
                self.template.gaps[gap] = known - after
            return known
        alone = self.talk.first(index + 1)
        try:
            last = self._first(index + 1, prompt=False)
        except RenderError:
            return None
        end = self._content_end(borders(self.template, alone, last), index)
        if end is None:
            return None
        alike = self.text[after : after + common(last[end:], self.text[after:])]
        return after + self._last_end(alike) if self._last_end(alike) else None

    def _end_by_header(self, index: int, after: int) -> int | None:
        before, following = self.talk.first(index), self.talk.messages[index + 1]
        skipped = self.talk._replace(messages=[*before.messages, following])
        try:
            head, text = self._first(index, prompt=False), self.template.render(skipped)
        except RenderError:
            return None
        found = borders(self.template, skipped, text)
        there = (found or {}).get((index, "content"))
        here = (self.borders or {}).get((index + 1, "content"))
        if not text.startswith(head) or not there or not here or there.start is None or here.start is None:
            return None
        header = text[len(head) : there.start]
        end = here.start - len(header)
        return end if end >= after and self.text.startswith(header, end) else None

    def _content_end(self, found: Borders | None, index: int) -> int | None:
        """Where the last content of a message ends, by the borders of a rendering."""
        places = [(found or {}).get((index, field)) for field in ("content", "tool_calls")]
        known = [place.end for place in places if place is not None and place.end is not None]
        return max(known) if known else None

    def _places(self, found: Borders, index: int) -> list[int | None]:
        fields = ("content", "reasoning_content", "tool_calls")
        return [found[index, field].start for field in fields if (index, field) in found]

    def _refused(self, change: HistoryError) -> DataError:
        marked, spoken = self.template.has_markers, len(self.spoken)
        found = f"it has {len(self.blocks)} {{% generation %}} blocks for {spoken} assistant messages"
        return DataError(
            f"{self.template.name} renders message {change.index + 1} differently in the conversation: {change.why}",
            "So its trained part cannot be found for certain, and "
            + (f"{found}." if marked else "the template has no {% generation %} blocks to go by."),
            "Add templates to plugins, which know many such templates; or train on the last answer of each row "
            "(options: {turns: last}), split the conversation into one row for each answer, or use a template "
            "with {% generation %} blocks.",
        )


def common(left: str, right: str) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(at for at in range(length) if left[at] != right[at])


def _cut(text: str, at: int) -> str:
    return repr(text[at : at + 30]) if at < len(text) else "nothing"
