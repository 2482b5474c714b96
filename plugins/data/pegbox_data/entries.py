"""One entry of `data.train` or `data.eval`, checked and opened: its parts, its format, validated options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.config import validate

from pegbox_data.config import DataConfig, DatasetEntry
from pegbox_data.declared import imported
from pegbox_data.places import EntryPlace

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Split
    from pegbox.types import Processor

    from pegbox_data.formats import Answers, Format, Rendered
    from pegbox_data.slices import SplitSlice
    from pegbox_data.sources import Part


@dataclass(frozen=True)
class OpenedEntry:
    """An entry ready to be read and rendered.

    Attributes:
        key: `train.0`: what messages and random choices call it.
        parts: its files or datasets.
        render: a source row as text; raises `DataError` for a row that cannot be used.
        wanted: which rows of the parts taken together are used, `limit` how many at most.
        settings: what tokens depend on besides the source rows.
    """

    key: str
    entry: DatasetEntry
    parts: Sequence[Part]
    render: Callable[[Mapping[str, Any]], Rendered | Answers]
    wanted: SplitSlice
    limit: int | None
    settings: Mapping[str, object]

    def bounds(self) -> tuple[int, int | None]:
        """The first row to use of all rows of the parts, and the one behind the last (None: to the end)."""
        total = sum(map(count_rows, self.parts)) if self.wanted.needs_total else None
        start, stop = self.wanted.bounds(total)
        if self.limit is not None:
            stop = min(start + self.limit, stop if stop is not None else start + self.limit)
        return start, stop


def count_rows(part: Part) -> int:
    """How many rows a part has; reads them all."""
    return sum(1 for _ in part.read())


def open_entry(ctx: Context, split: Split, index: int, processor: Processor) -> OpenedEntry:
    """Check one entry of the config and open it."""
    section = ctx.section(DataConfig)
    entry: DatasetEntry = getattr(section, split)[index]
    place = EntryPlace(ctx, ("data", split, index))
    form: Format = imported(place.item("format", entry.format))
    options = validate(form.options, dict(entry.options), ctx.config.layer, (*place.at, "options"))
    fields = place.fields(entry, form)
    streaming = section.streaming and split == "train"
    parts, wanted = place.parts(entry, streaming)
    settings = {
        "fields": fields,
        "format": entry.format,
        "made by": _maker(form),
        "options": options.model_dump(mode="json"),
        "columns": section.columns,
    }
    render = form.open(fields, options, processor)
    limits = [limit for limit in (entry.limit, _dry_run(section, split)) if limit is not None]
    return OpenedEntry(f"{split}.{index}", entry, parts, render, wanted, min(limits) if limits else None, settings)


def _dry_run(section: DataConfig, split: Split) -> int | None:
    """How many rows of an entry `data.limit` needs: held-out rows come on top."""
    if section.limit is None:
        return None
    return section.limit + (min(section.eval_rows, section.limit) if section.eval_rows and split == "train" else 0)


def _maker(form: Format) -> object:
    """Identifies the code of a format of another plugin; ours is identified as a whole."""
    kind = type(form)
    if kind.__module__.startswith("pegbox_data."):
        return kind.__qualname__
    path = getattr(importlib.import_module(kind.__module__), "__file__", None)
    stat = Path(path).stat() if path else None
    return [kind.__module__, kind.__qualname__, [stat.st_size, stat.st_mtime_ns] if stat else None]
