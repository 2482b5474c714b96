"""Tokens of a row as text, and the two answers of a preference side by side: what they share once, then two columns.

Trained tokens are coloured on a terminal, every other one underlined so that borders show; elsewhere they stand
between marks.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import typer
from pegbox.rows import UNTRAINED

from pegbox_data.signed import NAMES

if TYPE_CHECKING:
    from pegbox_data.inspecting import Seen

OPEN, CLOSE = "⟦", "⟧"
"""Around trained text where there are no colours."""
BETWEEN = " │ "
NARROWEST = 20
Token = tuple[str, int]
"""A token as text, and its label."""


class Piece(NamedTuple):
    """Text of one kind: trained or not, underlined or not."""

    text: str
    trained: bool
    underlined: bool


def text(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """The tokens of a row, one after the other."""
    return "".join(_styled(piece, "↵\n") for piece in _pieces(list(zip(tokens, labels, strict=True))))


def answers(row: Seen) -> Iterator[str]:
    """The lines of a row of several answers: their common prompt, then their own tokens in columns."""
    tokens: list[Token] = list(zip(row.tokens, row.labels, strict=True))
    documents: list[list[Token]] = []
    for length in row.documents:
        documents.append(tokens[:length])
        tokens = tokens[length:]
    shared = 0
    while all(shared < len(own) and own[shared] == documents[0][shared] for own in documents):
        if documents[0][shared][1] != UNTRAINED:
            break
        shared += 1
    if shared:
        yield "".join(_styled(piece, "↵\n") for piece in _pieces(documents[0][:shared]))
    room = shutil.get_terminal_size().columns - len(BETWEEN) * (len(documents) - 1)
    width = max(NARROWEST, room // len(documents))
    heads = [
        typer.style(f"{NAMES.get(sign, sign)} ({len(own):,} tokens)".ljust(width), bold=True)
        for own, sign in zip(documents, row.signs, strict=True)
    ]
    yield BETWEEN.join(heads).rstrip()
    columns = [list(_wrapped(_pieces(own[shared:]), width)) for own in documents]
    for lines in zip_longest(*columns, fillvalue=("", 0)):
        yield BETWEEN.join(line + " " * (width - used) for line, used in lines).rstrip()


def _pieces(tokens: Sequence[Token]) -> Iterator[Piece]:
    if sys.stdout.isatty():
        for number, (token, label) in enumerate(tokens):
            yield Piece(token, label != UNTRAINED, bool(number % 2))
        return
    for trained, run in groupby(tokens, key=lambda token: token[1] != UNTRAINED):
        joined = "".join(token for token, _ in run)
        yield Piece(f"{OPEN}{joined}{CLOSE}" if trained else joined, trained, False)


def _styled(piece: Piece, line_break: str = "") -> str:
    if not sys.stdout.isatty():
        return piece.text
    written = piece.text.replace("\n", line_break) if line_break else piece.text
    colour = "green" if piece.trained else None
    return typer.style(written, fg=colour, dim=not piece.trained, underline=piece.underlined)


def _wrapped(pieces: Iterator[Piece], width: int) -> Iterator[tuple[str, int]]:
    """Lines of a column, each with the width it takes; a line break is shown where it is."""
    line, used = "", 0
    for piece in pieces:
        part = ""
        for character in piece.text:
            shown, wide = ("↵", 1) if character == "\n" else (character, _width(character))
            if used + wide > width:
                yield line + _styled(piece._replace(text=part)), used
                line, used, part = "", 0, ""
            part, used = part + shown, used + wide
            if character == "\n":
                yield line + _styled(piece._replace(text=part)), used
                line, used, part = "", 0, ""
        if part:
            line += _styled(piece._replace(text=part))
    if line:
        yield line, used


def _width(character: str) -> int:
    """Columns that a character takes on a terminal."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
