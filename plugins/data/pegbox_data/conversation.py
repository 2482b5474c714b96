"""Finds, in a rendered conversation, what the assistant would have had to generate.

By construction, not by searching strings. For an assistant's message i the template is rendered twice: over
messages[:i] with the generation prompt, and over messages[:i+1]. Both must be prefixes of the whole
conversation's text; what lies between them is the trained turn, its end-of-turn token included. Templates
that rewrite history (they hide earlier thinking, or close the last turn differently) break this. For them the
template's own `{% generation %}` blocks count, and without those the row is refused: a wrong mask is worse
than no run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox.errors import DataError

from pegbox_data.formats import Rendered, Span
from pegbox_data.messages import shown
from pegbox_data.template import ChatTemplate, RenderError

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.template import Message

EMPTY_TURN = "trained messages are empty"
NO_END_OF_TURN = "trained messages have no end-of-turn token after them"
REWRITTEN = "trained messages are not rendered as written: the template hides or changes part of them"


class HistoryError(Exception):
    """A message is rendered differently when others follow it: `at` is the first character that differs."""

    def __init__(self, index: int, why: str, at: int = 0) -> None:
        super().__init__(why)
        self.index, self.why, self.at = index, why, at


@dataclass(frozen=True)
class Conversation:
    """Renders conversations and finds what is trained in them.

    Attributes:
        template: the chat template.
        ends: the tokenizer's added tokens, one of which ends a turn.
    """

    template: ChatTemplate
    ends: tuple[str, ...]

    @classmethod
    def of(cls, processor: Processor, template_kwargs: Mapping[str, object]) -> Conversation:
        """With the template of a processor's tokenizer; without one an error says what to do."""
        tokenizer = processor.tokenizer
        template = ChatTemplate.of(tokenizer, template_kwargs)
        if template is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template",
                "Conversations become text through it; base models often come without one.",
                "Start from an instruct model, put a chat_template.jinja beside the tokenizer's files, or "
                "train on plain text with format: completion and options: {chat_template: false}.",
            )
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        return cls(template, tuple(added - {""}))

    def render(self, messages: Sequence[Message], trained: Sequence[int], tools: object = None) -> Rendered:
        """The conversation as text, trained on the messages with the given indices, ascending."""
        if not trained:
            raise DataError(
                "no message of this row is trained",
                f"Its roles are: {', '.join(str(message['role']) for message in messages)}.",
                "Remove the row, or check its train and weight flags.",
            )
        try:
            text = self.template.render(messages, tools)
        except RenderError as error:
            raise DataError(
                f"{self.template.name} refuses the row: {error}",
                f"Its roles are: {', '.join(str(message['role']) for message in messages)}.",
                "Change the row to what the template accepts.",
            ) from error
        try:
            turns = [self._turn(messages, index, text, tools) for index in trained]
        except HistoryError as change:
            turns = self._marked(messages, trained, tools, change)
        notes = [
            note
            for index, (start, end) in zip(trained, turns, strict=True)
            for note in self._notes(index, messages[index], text[start:end], text)
        ]
        return Rendered(text, [self._span(text, *turn) for turn in turns], notes=tuple(notes))

    def _turn(self, messages: Sequence[Message], index: int, text: str, tools: object) -> tuple[int, int]:
        """Where the trained part of one message begins and its turn ends, in `text`."""
        start, end = self._start(messages, index, text, tools), len(text)
        if index + 1 < len(messages):
            try:
                end = self._prefix(messages[: index + 1], text, tools, prompt=False, index=index)
            except HistoryError as change:
                end = self._agreed_end(messages[index], text, start, change)
        if end <= start:
            raise HistoryError(index, "the template leaves it out")
        return start, end

    def _agreed_end(self, message: Message, text: str, start: int, change: HistoryError) -> int:
        """Where a turn ends that is rendered alike with and without what follows it, up to its end-of-turn.

        Phi-3's template puts EOS after a conversation: the two renderings differ, but behind `<|end|>`.
        """
        alike = text[start : change.at]
        end = max((alike.rfind(token) + len(token) for token in self.ends if token in alike), default=0)
        if end == 0 or (message.get("content") or "").strip() not in alike[:end]:
            raise change
        return start + end

    def _start(self, messages: Sequence[Message], index: int, text: str, tools: object) -> int:
        generated = messages[index]["role"] == "assistant"
        if index:
            return self._prefix(messages[:index], text, tools, prompt=generated, index=index)
        return self._opening(messages[0], text, tools) if generated else 0

    def _prefix(self, messages: Sequence[Message], text: str, tools: object, *, prompt: bool, index: int) -> int:
        """The length of a rendering that must be a prefix of `text`."""
        try:
            prefix = self.template.render(messages, tools, prompt)
        except RenderError as error:
            raise HistoryError(index, f"it cannot be rendered alone: {error}") from error
        if text.startswith(prefix):
            return len(prefix)
        at = _common(prefix, text)
        when = "when the answer is to be generated" if prompt else "when no message follows"
        raise HistoryError(
            index,
            f"{when} the text goes on with {_cut(prefix, at)}, in the conversation with {_cut(text, at)}",
            at,
        )

    def _opening(self, message: Message, text: str, tools: object) -> int:
        """Where the content of an assistant's message begins that no other precedes.

        Templates seldom render an empty conversation as a prefix of one that the assistant opens. So the
        message is rendered with two contents that differ in their first character: up to there lies what is
        not its own.
        """
        try:
            first, second = (self.template.render([{**message, "content": probe}], tools) for probe in "01")
        except RenderError as error:
            raise HistoryError(0, f"it cannot be rendered alone: {error}") from error
        start = _common(first, second)
        if not text.startswith(first[:start]):
            raise HistoryError(0, "what stands before it depends on what follows it")
        return start

    def _marked(
        self, messages: Sequence[Message], trained: Sequence[int], tools: object, change: HistoryError
    ) -> list[tuple[int, int]]:
        """The turns by the template's `{% generation %}` blocks, one for each message of the assistant."""
        spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marked = self.template.has_markers
        text, blocks = self.template.render_marked(messages, tools) if marked else ("", [])
        if not blocks or len(blocks) != len(spoken) or not set(trained) <= set(spoken):
            found = f"it has {len(blocks)} {{% generation %}} blocks for {len(spoken)} assistant messages"
            raise DataError(
                f"{self.template.name} renders message {change.index + 1} differently in the conversation: "
                f"{change.why}",
                "So its trained part cannot be found for certain, and "
                + (f"{found}." if marked else "the template has no {% generation %} blocks to go by."),
                "Train on the last answer of each row (options: {turns: last}), split the conversation into "
                "one row for each answer, or use a template with {% generation %} blocks.",
            ) from change
        turns = []
        for index in trained:
            start, end = blocks[spoken.index(index)]
            # Some templates put the header into the block; the generation prompt gives it to the model.
            with suppress(HistoryError):
                start = max(start, self._start(messages, index, text, tools))
            turns.append((start, end))
        return turns

    def _span(self, text: str, start: int, end: int) -> Span:
        """A turn without the whitespace that follows an end-of-turn token."""
        kept = text[start:end].rstrip()
        return Span(start, start + len(kept) if kept.endswith(self.ends) else end, end)

    def _notes(self, index: int, message: Message, turn: str, text: str) -> Iterator[str]:
        """What is unusual about a trained turn; one that lost its whole content is an error."""
        content = (message.get("content") or "").strip()
        if content and content not in turn:
            if not any(word in turn for word in content.split()):
                raise DataError(
                    f"{self.template.name} leaves out the content of message {index + 1}",
                    f"It renders {shown(content)} as {shown(turn)}; "
                    "templates of multimodal models may take lists of parts only.",
                    "Use a template that renders text.",
                )
            if content not in text:
                yield REWRITTEN
        if not content and not message.get("tool_calls"):
            yield EMPTY_TURN
        if not turn.rstrip().endswith(self.ends):
            yield NO_END_OF_TURN


def _common(left: str, right: str) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    return next((at for at in range(length) if left[at] != right[at]), length)


def _cut(text: str, at: int) -> str:
    return repr(text[at : at + 30]) if at < len(text) else "nothing"
