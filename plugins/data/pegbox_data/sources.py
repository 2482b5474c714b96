"""Sources: how files become rows, each with the line it came from and the place behind it.

A source is an `Item` of kind `source`; its target has the attributes of `FileSource`, or of `PartSource` if its rows
do not lie in files. A row that cannot be read is an entry with an error, not an exception, so that the caller can
count all bad rows and name the first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from pegbox.errors import DataError
from pegbox.section import Section, setting

if TYPE_CHECKING:
    from pegbox_data.config import DatasetEntry
    from pegbox_data.files import DataFile, DigestMemo


class Place(NamedTuple):
    """Where reading goes on: `offset` in the source's own unit (bytes or rows), `line` lines or rows before it."""

    offset: int = 0
    line: int = 0
    token: str = ""
    """What else a source must know to go on, if anything; JSON."""


START = Place()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: its line (or row number, from 1) and its columns, or why it cannot be read; the place behind it."""

    line: int
    row: Mapping[str, Any] | None
    error: DataError | None = None
    behind: Place = START


class NoOptions(Section):
    """This source has no options."""


class FileSource(Protocol):
    """Reads files of one kind. `suffixes` are those it is chosen by when the config does not name it."""

    suffixes: tuple[str, ...]
    options: type[Section]

    def read(self, file: DataFile, options: Any, start: Place) -> Iterator[Entry]:
        """The rows in order, from `start` on. Raises `DataError` for a file that is no such file at all."""


class Part(Protocol):
    """Rows that belong together: those of one file, or of one dataset.

    Attributes:
        name: what messages call it.
        is_small: its rows are not worth keeping between runs.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_small(self) -> bool: ...

    def read(self, start: Place = START) -> Iterator[Entry]:
        """The rows in order, from `start` on."""

    def identity(self, memo: DigestMemo) -> object:
        """What the rows depend on, as plain data: the content, not where it lies."""

    def sketch(self) -> object:
        """The same as far as it can be told without reading everything."""


class PartSource(Protocol):
    """Makes rows that do not lie in files; `path` and the other keys of the entry mean what it says they mean."""

    options: type[Section]

    def parts(self, entry: DatasetEntry, options: Any, streaming: bool) -> Sequence[Part]:
        """The rows of an entry."""


CORRECT = "Correct the row or remove it."
ARRAY = "If the file is one array of objects, set source: json."
MAGIC = {b"\x1f\x8b": "name.jsonl.gz", b"\x28\xb5\x2f\xfd": "name.jsonl.zst"}
"""How compressed files begin, and how such a file is called."""


class JsonLines:
    """One JSON object per line; blank lines are skipped. Places are bytes."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")
    options = NoOptions

    def read(self, file: DataFile, options: Section, start: Place = START) -> Iterator[Entry]:
        with file.open(start.offset) as opened:
            at, decode = start.offset, json.loads
            for line, raw in enumerate(opened, start.line + 1):
                at += len(raw)
                text = raw[3:] if line == 1 and raw.startswith(b"\xef\xbb\xbf") else raw
                if text.isspace() or not text:
                    continue
                behind = Place(at, line)
                try:
                    row = decode(text)
                except UnicodeDecodeError as error:
                    yield Entry(line, None, no_utf8(error), behind)
                except ValueError as error:
                    begins_array = line == 1 and text.lstrip().startswith(b"[")
                    yield Entry(line, None, _no_json(error, ARRAY if begins_array else CORRECT), behind)
                else:
                    yield _object(line, row, behind)


def _from_row(entries: Iterator[Entry], start: Place) -> Iterator[Entry]:
    """Entries from a row on, each with the number of rows behind it as its place."""
    for number, entry in enumerate(entries):
        if number >= start.offset:
            yield Entry(entry.line, entry.row, entry.error, Place(number + 1, number + 1))


class JsonArray:
    """One array of JSON objects. Places are rows; the file is read whole."""

    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    options = NoOptions

    def read(self, file: DataFile, options: Section, start: Place = START) -> Iterator[Entry]:
        return _from_row(self._entries(file), start)

    def _entries(self, file: DataFile) -> Iterator[Entry]:
        try:
            with file.open() as opened:
                text = opened.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise no_utf8(error) from error
        decoder, line, at = json.JSONDecoder(), 1, _skip(text, 0)
        if at == len(text):
            return
        if text[at] != "[":
            raise DataError(
                "the file holds no array",
                "A .json file must be one array of objects: [{...}, {...}].",
                "If each of its lines is an object, set source: jsonl.",
            )
        counted, at = 0, _skip(text, at + 1)
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            try:
                row, at = decoder.raw_decode(text, at)
            except ValueError as error:
                yield Entry(line, None, _no_json(error))
                return
            yield _object(line, row, START)
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]"):
                line += text.count("\n", counted, at)
                yield Entry(
                    line,
                    None,
                    DataError("no ',' or ']' after the row", "The array is not valid JSON.", "Correct it."),
                )
                return
            at = _skip(text, at + 1) if text[at] == "," else at


class Csv:
    """Comma-separated values with a header line. Every value is a string. Places are rows."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv")
    options = NoOptions

    def read(self, file: DataFile, options: Section, start: Place = START) -> Iterator[Entry]:
        return _from_row(self._entries(file), start)

    def _entries(self, file: DataFile) -> Iterator[Entry]:
        with io.TextIOWrapper(file.open(), encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True, delimiter="\t" if file.plain_name.endswith(".tsv") else ",")
            line = 1
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    raise DataError(
                        f"a column name stands twice: {', '.join(header)}",
                        "Only one of the two could count.",
                        "Rename one of them.",
                    )
                line = reader.line_num + 1
                for cells in reader:
                    if cells:
                        yield self._entry(line, header, cells)
                    line = reader.line_num + 1
            except UnicodeDecodeError as error:
                raise no_utf8(error) from error
            except csv.Error as error:
                yield Entry(line, None, DataError("no valid CSV", f"The parser says: {error}.", "Check its quotes."))

    def _entry(self, line: int, header: list[str], cells: list[str]) -> Entry:
        if len(cells) != len(header):
            error = DataError(
                f"{len(cells)} values for {len(header)} columns",
                f"The header says: {', '.join(header)}.",
                "Put values that hold a comma or a line break into quotes.",
            )
            return Entry(line, None, error)
        return Entry(line, dict(zip(header, cells, strict=True)))


class TextOptions(Section):
    """Options of the source `text`."""

    rows: Literal["line", "file"] = setting("line", "What a row is: each line that is not blank, or the whole file.")
    column: str = setting("text", "Name of the column that holds the text.", min_length=1)


class Text:
    """Plain text. Places are bytes."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".text", ".md")
    options = TextOptions

    def read(self, file: DataFile, options: TextOptions, start: Place = START) -> Iterator[Entry]:
        with file.open(start.offset) as opened:
            at = start.offset
            pieces = opened if options.rows == "line" else filter(None, [opened.read()])
            for line, raw in enumerate(pieces, start.line + 1):
                at += len(raw)
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield Entry(line, None, no_utf8(error), Place(at, line))
                    continue
                text = text.rstrip("\r\n") if options.rows == "line" else text
                if text.strip():
                    yield Entry(line, {options.column: text}, None, Place(at, line))


jsonl, json_array, comma_separated, text = JsonLines(), JsonArray(), Csv(), Text()


def _object(line: int, row: Any, behind: Place) -> Entry:
    if isinstance(row, dict):
        return Entry(line, row, None, behind)
    remedy = ARRAY if line == 1 and isinstance(row, list) else "Write it as {...}."
    error = DataError(f"the row is {row!r:.60}", "A row is a JSON object.", remedy)
    return Entry(line, None, error, behind)


def _skip(text: str, at: int) -> int:
    """The next position that is no whitespace."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _no_json(error: ValueError, remedy: str = CORRECT) -> DataError:
    where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"no valid JSON{where}", f"The parser says: {what}.", remedy)


def no_utf8(error: UnicodeDecodeError) -> DataError:
    """The error for text that is not UTF-8."""
    name = next((name for magic, name in MAGIC.items() if bytes(error.object).startswith(magic)), None)
    if name is not None:
        return DataError(
            "the file is compressed, and its name does not say so",
            "How a file is read is told by how its name ends.",
            f"Rename it, as in {name}.",
        )
    return DataError(
        f"no valid UTF-8: byte 0x{error.object[error.start]:02x}",
        "Text files are read as UTF-8.",
        "Save the file as UTF-8.",
    )
