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
    from pegbox.record import Json
    from pegbox.section import Section
    from pegbox.types import Processor

TEMPLATES = "chat_templates"
"""The part of a `Processor` that holds the built-in chat templates: Jinja text by name."""
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
        prompt: it is a prompt to be answered: nothing of it is trained.
        columns: values that stay with the example, whether `data.columns` names them or not.
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
    prompt: bool = False
    columns: Mapping[str, Json] | None = None


@dataclass(slots=True)
class Answers:
    """Answers to one prompt, each as a text of its own with the prompt before it.

    Attributes:
        texts: one for each answer; what is trained in them are the answers.
        signs: for each +1, it is wanted, or -1, it is not.
        apart: each becomes a row of its own; else they are documents of one row and are never separated.
    """

    texts: Sequence[Rendered]
    signs: Sequence[int]
    apart: bool = False


class Tokens(NamedTuple):
    """A row that came as tokens: ids, and whether each is trained; both of length T."""

    ids: Sequence[int]
    trained: Sequence[bool]


Renderer = Callable[[SourceRow], Rendered | Answers]
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
