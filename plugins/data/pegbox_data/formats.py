"""What a format is: it turns one source row into text and says which characters are trained.

A format is an `Item` of kind `format`; `ctx.items("format")` holds those of all active plugins. Its target is
an object (or `"package.module:attribute"`) with the attributes of `Format`. The text is tokenized elsewhere,
once and whole; spans are character positions, so that a format never deals with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pegbox.errors import DataError

if TYPE_CHECKING:
    from pegbox.section import Section
    from pegbox.types import Processor

SourceRow = Mapping[str, Any]
"""A row as a source read it: column names and values."""


class Span(NamedTuple):
    """Characters that are trained.

    Tokens that begin in [start, end) are trained if they end by `limit`. `limit` lies after `end` where the
    template puts
    whitespace after the end of a turn: that whitespace is not trained, but a tokenizer may swallow it into
    the end-of-turn token.
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
        eos: put the EOS token after the text; it is trained.
        notes: what is unusual about the row but no error; counted and printed.
    """

    text: str
    spans: list[Span]
    bos: bool = False
    eos: bool = False
    notes: tuple[str, ...] = ()


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
