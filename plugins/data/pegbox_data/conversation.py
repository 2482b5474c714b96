"""From the messages of a row to text with trained spans: which turns, which parts of them, which end tokens.

The text is what the template renders, the spans are found by construction (`turns`, `borders`). What the reader of an
audit should know about a row is noted: a message the template leaves out, an answer without end, hidden reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from pegbox.errors import DataError

from pegbox_data.findings import Found
from pegbox_data.formats import Rendered, Span
from pegbox_data.messages import shown
from pegbox_data.template import ChatTemplate, RenderError, Talk
from pegbox_data.turns import Rendering, Turn
from pegbox_data.twins import Twins

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.marks import Mark

Ends = Literal["all", "turn", "last", "none"]
CLOSER = re.compile(r"</(?!s>)|\[/")
"""Special tokens such as `</think>` or `[/TOOL_CALLS]` close a part of an answer, not a turn."""


class RefusedError(DataError):
    """The template itself refuses a row, or fails on it."""


class Wanted(NamedTuple):
    """What of a conversation is trained.

    Attributes:
        messages: indices of the trained messages, ascending.
        marks: by message index, the character ranges that decide for themselves.
        turn_ends, sequence_ends: whose end-of-turn and end-of-sequence tokens are trained.
        inputs: everything is trained.
    """

    messages: Sequence[int]
    marks: Mapping[int, Sequence[Mark]] = {}
    turn_ends: Ends = "turn"
    sequence_ends: Ends = "turn"
    inputs: bool = False


@dataclass(frozen=True)
class Conversation:
    """Renders conversations and finds what is trained in them.

    Attributes:
        template: the chat template.
        ends: the tokenizer's special tokens, one of which ends a turn; `end_ids` their ids.
        eos: the tokenizer's end-of-sequence token.
        twins: built-in templates whose blocks stand in for those of a template that has none exactly.
    """

    template: ChatTemplate
    ends: tuple[str, ...]
    end_ids: Mapping[str, int]
    eos: str | None
    twins: Twins | None

    @classmethod
    def of(cls, processor: Processor, template_kwargs: Mapping[str, object]) -> Conversation:
        """With the template of a processor's tokenizer; without one an error says what to do."""
        tokenizer = processor.tokenizer
        template = ChatTemplate.of(tokenizer, template_kwargs)
        if template is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template",
                "Conversations become text through it; base models often come without one.",
                "Choose one with hf.chat_template, start from an instruct model, or train on plain text with "
                "format: completion and options: {chat_template: false}.",
            )
        added = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or token.content == tokenizer.eos_token)
        }
        ends = {token: number for token, number in added.items() if not CLOSER.match(token)}
        twins = Twins.of(processor, {**tokenizer.special_tokens_map, **template_kwargs})
        return cls(template, tuple(ends), ends, tokenizer.eos_token, None if template.exact else twins)

    def render(self, talk: Talk, wanted: Wanted) -> Rendered:
        """The conversation as text, with what is trained of it."""
        with self._refusals(talk):
            text, blocks = (
                self.template.render_marked(talk) if self.template.has_markers else (self.template.render(talk), [])
            )
        rendering = Rendering(self.template, talk, text, blocks, self.ends, self.twins)
        notes = list(self._vanished(rendering))
        if not wanted.messages:
            roles = ", ".join(str(message["role"]) for message in talk.messages)
            notes.append(Found("no-trained-token", f"no message of this row is trained; its roles are: {roles}"))
        if wanted.inputs:
            return Rendered(text, [Span(0, len(text), len(text))], notes=tuple(notes))
        spans: list[Span] = []
        everywhere: set[str] = set()
        for index in wanted.messages:
            turn = rendering.turn(index)
            ends = _Ends.of(self, text, turn)
            everywhere |= ends.wanted_everywhere(wanted)
            spans += ends.spans(turn, wanted, last=index == wanted.messages[-1])
            notes += self._notes(rendering, index, turn, ends, wanted)
        for index, marks in wanted.marks.items():
            spans = _carved(spans, rendering, index, marks)
        return Rendered(
            text, spans, notes=tuple(notes), everywhere=tuple(sorted(self.end_ids[token] for token in everywhere))
        )

    def render_prompt(self, talk: Talk) -> Rendered:
        """The conversation as text, followed by what invites the assistant to speak; nothing of it is trained."""
        with self._refusals(talk):
            text = self.template.render(talk, prompt=True)
        rendering = Rendering(self.template, talk, text, (), self.ends)
        return Rendered(text, [], notes=tuple(self._vanished(rendering)), prompt=True)

    @contextmanager
    def _refusals(self, talk: Talk) -> Iterator[None]:
        """Around a rendering: what the template refuses, as an error of the row."""
        try:
            yield
        except RenderError as error:
            raise RefusedError(
                f"{self.template.name} refuses the row: {error}",
                f"Its roles are: {', '.join(str(message['role']) for message in talk.messages)}.",
                "Change the row to what the template accepts.",
            ) from error

    def _vanished(self, rendering: Rendering) -> Iterator[Found]:
        """Messages and tools of which the template renders nothing."""
        text, messages = rendering.text, rendering.talk.messages
        for index, message in enumerate(messages):
            calls = message.get("tool_calls")
            if calls and not all(call.get("function", call)["name"] in text for call in calls):
                yield Found("vanished-turn", f"{self.template.name} leaves out the tool calls of message {index + 1}")
        contents = [(message.get("content") or "").strip() for message in messages]
        if not _in_order(contents, text):
            for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
                if content and not message.get("tool_calls") and not self._rendered(rendering, index, content):
                    yield Found(
                        "vanished-turn",
                        f"{self.template.name} leaves out the content of message {index + 1} "
                        f"({message['role']}): {shown(content)}",
                    )
        for tool in rendering.talk.tools or ():  # type: ignore[attr-defined]
            name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
            if name and str(name) not in text:
                yield Found("vanished-tools", f"{self.template.name} leaves out the tool '{name}'")
                return

    def _rendered(self, rendering: Rendering, index: int, content: str) -> bool:
        """Whether a content was rendered at all, perhaps changed."""
        if rendering.borders is not None:
            return (index, "content") in rendering.borders
        return any(word in rendering.text for word in content.split())

    def _notes(self, rendering: Rendering, index: int, turn: Turn, ends: _Ends, wanted: Wanted) -> Iterator[Found]:
        """What is unusual about a trained turn."""
        message, text = rendering.talk.messages[index], rendering.text[turn.start : turn.end]
        content, reasoning = (message.get("content") or "").strip(), (message.get("reasoning_content") or "").strip()
        if turn.note:
            yield Found(turn.note)
        if content and content not in text:
            yield Found("rewritten-answer")
        shows = bool(reasoning) and reasoning in text
        if shows and rendering.borders is not None:
            shows = (index, "reasoning_content") in rendering.borders
        if reasoning and not shows:
            yield Found("hidden-reasoning")
        if not content and not message.get("tool_calls") and not shows:
            yield Found("empty-answer")
        if not ends.turn and wanted.turn_ends != "none":
            yield Found("missing-end-of-turn", f"message {index + 1} ends with {shown(text[-20:])}")


def _in_order(contents: Sequence[str], text: str) -> bool:
    """Whether a text holds all of these, one after the other: the cheap proof that none is missing."""
    at = 0
    for content in contents:
        found = text.find(content, at)
        if found < 0:
            return False
        at = found + len(content)
    return True


@dataclass(frozen=True)
class _Ends:
    """The tokens that close a turn: where they begin and end, and where a separate EOS after them does."""

    begin: int
    turn: tuple[str, ...]
    turn_end: int
    eos: str | None
    eos_begin: int
    end: int

    @classmethod
    def of(cls, conversation: Conversation, text: str, turn: Turn) -> _Ends:
        kept = turn.start + len(text[turn.start : turn.end].rstrip())
        tokens: list[tuple[str, int, int]] = []
        while text.endswith(conversation.ends, turn.start, kept):
            token = max((end for end in conversation.ends if text.endswith(end, turn.start, kept)), key=len)
            tokens.insert(0, (token, kept - len(token), kept))
            kept = turn.start + len(text[turn.start : kept - len(token)].rstrip())
        if not tokens:
            return cls(turn.end, (), turn.end, None, turn.end, turn.end)
        separate = len(tokens) > 1 and tokens[-1][0] == conversation.eos != tokens[0][0]
        last = tokens[-2] if separate else tokens[-1]
        names = tuple(token for token, _, _ in tokens)
        eos = names[-1] if separate else None
        return cls(tokens[0][1], names[:-1] if separate else names, last[2], eos, *tokens[-1][1:])

    def spans(self, turn: Turn, wanted: Wanted, last: bool) -> list[Span]:
        """The trained part of a turn, with the end tokens that are wanted."""
        of_turn, of_sequence = (
            rule in ("all", "turn") or (rule == "last" and last) for rule in (wanted.turn_ends, wanted.sequence_ends)
        )
        if not self.turn or (of_turn and (of_sequence or not self.eos)):
            return [Span(turn.start, self.end if self.turn else turn.end, turn.end)]
        if of_turn:
            return [Span(turn.start, self.turn_end, self.turn_end)]
        body = Span(turn.start, self.begin, self.begin)
        return [body, Span(self.eos_begin, self.end, turn.end)] if of_sequence and self.eos else [body]

    def wanted_everywhere(self, wanted: Wanted) -> set[str]:
        """Tokens that are trained wherever they stand, in turns of other roles too."""
        found = {self.turn[-1]} if self.turn and wanted.turn_ends == "all" else set()
        return found | ({self.eos} if self.eos and wanted.sequence_ends == "all" else set())


def _carved(spans: list[Span], rendering: Rendering, index: int, marks: Sequence[Mark]) -> list[Span]:
    """Spans with the character ranges of one message put in or taken out."""
    for mark in marks:
        start, end = _place(rendering, index, mark)
        kept: list[Span] = []
        for span in spans:
            if span.limit <= start or span.start >= end:
                kept.append(span)
                continue
            if span.start < start:
                kept.append(Span(span.start, start, start))
            if span.end > end:
                kept.append(Span(end, span.end, span.limit))
        spans = sorted([*kept, Span(start, end, end)]) if mark.train and end > start else kept
    return spans


def _place(rendering: Rendering, index: int, mark: Mark) -> tuple[int, int]:
    """Where the characters of a mark stand in the text."""
    border = (rendering.borders or {}).get((index, mark.field))
    field = str(rendering.talk.messages[index].get(mark.field) or "")
    core, text = field.strip(), rendering.text
    if border is None or border.start is None or border.end is None or text[border.start : border.end] != core:
        raise DataError(
            f"{rendering.template.name} does not render the {mark.field} of message {index + 1} as written",
            "It holds character ranges to train, whose place in the text cannot be told.",
            "Remove them, or use a template that leaves contents alone.",
        )
    first, last = (min(max(at - border.lead, 0), len(core)) for at in (mark.begin, mark.end))
    return border.start + first, border.start + last
