"""What a format is: it turns one source row into text and says which characters are trained.

A format is an `Item` of kind `format`; `ctx.items("format")` holds those of all active plugins. Its target is
an object (or `"package.module:attribute"`) with the attributes of `Format`. The text is tokenized elsewhere,
once and whole; spans are character positions, so that a format never deals with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pegbox.errors import DataError

from pegbox_data.findings import Found

if TYPE_CHECKING:
    from pegbox.section import Section
    from pegbox.types import Processor

TEMPLATES = "chat_templates"
"""The part of a `Processor` that holds the built-in chat templates: Jinja text by name."""
ELSEWHERE = {
    "sharegpt": "chat with fields: {messages: conversations, role: from, content: value} and "
    "options: {roles: {human: user, gpt: assistant}}",
    "chat_template": "chat",
    "messages": "chat",
    "openai": "chat",
    "alpaca_chat": "alpaca with options: {chat_template: true}",
    "alpaca_instruct": "alpaca",
    "alpaca_w_system": "alpaca",
    "prompt_completion": "completion",
    "text": "pretraining",
    "pretrain": "pretraining",
    "tokenized": "tokens",
    "stepwise_supervised": "steps",
}
"""What formats of other trainers are here."""
SourceRow = Mapping[str, Any]
"""A row as a source read it: column names and values."""


class Span(NamedTuple):
    """Characters that are trained.

    Tokens that begin in [start, end) are trained if they end by `limit`. `limit` lies after `end` where the template
    puts whitespace after the end of a turn: that whitespace is not trained, but a tokenizer may swallow it into the
    end-of-turn token.
    """

    start: int
    end: int
    limit: int


@dataclass(slots=True)
class Rendered:
    """One row as text.

    Attributes:
        text: everything the model sees, special tokens included.
        spans: what is trained, in order, not overlapping.
        bos: put the tokenizer's own prefix (usually BOS) before the text; templates write it themselves.
        eos: put the EOS token after the text; `eos_trained`: it is trained.
        notes: what the audit found; counted and printed, or an error.
        everywhere: ids of tokens that are trained wherever they stand.
        tokens: the row is tokenized already; there is no text and no span.
        split: if the row is longer than allowed, it is cut into several rows rather than dropped.
    """

    text: str
    spans: list[Span]
    bos: bool = False
    eos: bool = False
    eos_trained: bool = True
    notes: tuple[Found, ...] = ()
    everywhere: tuple[int, ...] = ()
    tokens: Tokens | None = None
    split: bool = False


class Tokens(NamedTuple):
    """A row that came as tokens: ids, and whether each is trained; both of length T."""

    ids: Sequence[int]
    trained: Sequence[bool]


Renderer = Callable[[SourceRow], Rendered]
"""Raises `DataError` for a row that cannot be used; file and line are added by the caller."""


class Format(Protocol):
    """How rows of one layout become text.

    Attributes:
        fields: canonical field names and the column each is read from unless the config maps it to another.
        options: the section that validates the entry's `options`.
    """

    fields: Mapping[str, str]
    options: type[Section]

    def open(self, fields: Mapping[str, str], options: Any, processor: Processor) -> Renderer:
        """Make the function that renders rows; `fields` is complete, `options` is a `self.options`."""


def column(row: SourceRow, name: str, canonical: str) -> Any:
    """The value of a column; a row without it is an error that lists what the row has."""
    if name in row:
        return row[name]
    raise DataError(
        f"no field '{name}'",
        f"The row has: {', '.join(map(str, row)) or 'nothing'}.",
        f"Name the field that holds it in the config: fields: {{{canonical}: ...}}",
    )
