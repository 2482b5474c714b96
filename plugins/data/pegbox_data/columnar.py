"""Sources of tables: Apache Parquet, Arrow files and streams, and folders written by `datasets`' save_to_disk.

Places are rows. Reading goes on at the row group or record batch that holds the row, so it takes as long as reading
one of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError

from pegbox_data.sources import START, Entry, NoOptions, Place

if TYPE_CHECKING:
    from pegbox.section import Section

    from pegbox_data.files import DataFile

BATCH_ROWS = 1024


class Parquet:
    """Apache Parquet, read in batches with pyarrow."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    options = NoOptions

    def read(self, file: DataFile, options: Section, start: Place = START) -> Iterator[Entry]:
        with _pyarrow("Parquet"):
            import pyarrow
            from pyarrow.parquet import ParquetFile
        with file.open() as opened, _valid("Parquet", pyarrow.ArrowInvalid):
            table = ParquetFile(opened)
            first = 0
            groups: list[int] = []
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if groups or first + rows > start.offset:
                    groups.append(group)
                else:
                    first += rows
            batches = table.iter_batches(batch_size=BATCH_ROWS, row_groups=groups) if groups else iter(())
            yield from _rows(batches, first, start.offset)


class Arrow:
    """Arrow files and streams; `datasets` writes the latter."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather")
    options = NoOptions

    def read(self, file: DataFile, options: Section, start: Place = START) -> Iterator[Entry]:
        with _pyarrow("Arrow"):
            import pyarrow
        local = not (file.is_remote or file.is_compressed)
        opened = pyarrow.memory_map(file.address) if local else file.open()
        with opened, _valid("Arrow", pyarrow.ArrowInvalid):
            is_file = opened.read(6) == b"ARROW1"
            opened.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(opened)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(opened))
            yield from _rows(batches, 0, start.offset)


def _rows(batches: Iterator[Any], number: int, offset: int) -> Iterator[Entry]:
    """The rows of record batches, the first of which is row `number`, from row `offset` on."""
    for batch in batches:
        skip = min(max(offset - number, 0), batch.num_rows)
        number += skip
        for at in range(skip, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(at, BATCH_ROWS).to_pylist():
                number += 1
                yield Entry(number, row, None, Place(number, number))


@contextmanager
def _pyarrow(kind: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(
            "pyarrow is not installed",
            f"{kind} files are read with it.",
            "Type: pip install 'pegbox-data[parquet]'",
        ) from error


@contextmanager
def _valid(kind: str, invalid: type[Exception]) -> Iterator[None]:
    try:
        yield
    except invalid as error:
        raise DataError(
            f"no valid {kind}", f"pyarrow says: {error}", "Write the file again, or set its source."
        ) from error


parquet, arrow = Parquet(), Arrow()
