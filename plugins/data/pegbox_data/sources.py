"""Sources: how files become rows, each with the line it came from.

A source is an `Item` of kind `source`; its target has the attributes of `Source`. A row that cannot be read
is an entry with an error, not an exception, so that the caller can count all bad rows and name the first.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pegbox.errors import DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a file: its line (or row number, from 1) and its columns, or why it cannot be read."""

    line: int
    row: Mapping[str, Any] | None
    error: DataError | None = None


class Source(Protocol):
    """Reads files of one kind. `suffixes` are those it is chosen by when the config does not name it."""

    suffixes: tuple[str, ...]

    def read(self, path: Path) -> Iterator[Entry]:
        """The rows in order. Raises `DataError` for a file that is no such file at all."""


class JsonLines:
    """One JSON object per line; blank lines are skipped."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def read(self, path: Path) -> Iterator[Entry]:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                text = raw[3:] if line == 1 and raw.startswith(b"\xef\xbb\xbf") else raw
                if text.isspace() or not text:
                    continue
                try:
                    row = json.loads(text)
                except UnicodeDecodeError as error:
                    yield Entry(line, None, _no_utf8(error))
                except ValueError as error:
                    yield Entry(line, None, _no_json(error))
                else:
                    yield _object(line, row)


class JsonArray:
    """One array of JSON objects."""

    suffixes: ClassVar[tuple[str, ...]] = (".json",)

    def read(self, path: Path) -> Iterator[Entry]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise _no_utf8(error) from error
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
            yield _object(line, row)
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
    """Comma-separated values with a header line. Every value is a string."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv",)

    def read(self, path: Path) -> Iterator[Entry]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
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
                raise _no_utf8(error) from error
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


class Parquet:
    """Apache Parquet, read in batches with pyarrow."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def read(self, path: Path) -> Iterator[Entry]:
        try:
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise DataError(
                "pyarrow is not installed",
                "Parquet files are read with it.",
                "Type: pip install 'pegbox-data[parquet]'",
            ) from error
        try:
            file = ParquetFile(path)
        except ArrowInvalid as error:
            raise DataError(
                "no valid Parquet", f"pyarrow says: {error}", "Write the file again, or set its source."
            ) from error
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Entry(number, row)


jsonl, json_array, comma_separated, parquet = JsonLines(), JsonArray(), Csv(), Parquet()


def _object(line: int, row: Any) -> Entry:
    if isinstance(row, dict):
        return Entry(line, row)
    return Entry(line, None, DataError(f"the row is {row!r:.60}", "A row is a JSON object.", "Write it as {...}."))


def _skip(text: str, at: int) -> int:
    """The next position that is no whitespace."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _no_json(error: ValueError) -> DataError:
    where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"no valid JSON{where}", f"The parser says: {what}.", "Correct the row or remove it.")


def _no_utf8(error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"no valid UTF-8: byte 0x{error.object[error.start]:02x}",
        "Text files are read as UTF-8.",
        "Save the file as UTF-8.",
    )
