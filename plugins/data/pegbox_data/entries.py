"""One entry of `data.train` or `data.eval`, checked and opened: file, source, format, validated options."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.config import validate
from pegbox.errors import ConfigError, DataError, did_you_mean

from pegbox_data.config import DataConfig, DatasetEntry

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Item, Processor, Split

    from pegbox_data.formats import Format, Rendered
    from pegbox_data.sources import Entry, Source


@dataclass(frozen=True)
class OpenedEntry:
    """A file ready to be read and rendered.

    Attributes:
        name: what messages call the file: its path as a person in the current folder would write it.
        render: a source row as text; raises `DataError` for a row that cannot be used.
        limit: how many rows are read at most; `columns`: which columns stay with them.
    """

    name: str
    path: Path
    source: Source
    render: Callable[[Mapping[str, Any]], Rendered]
    limit: int | None
    columns: tuple[str, ...]
    settings: Mapping[str, object]

    def read(self) -> Iterator[Entry]:
        """The rows of the file; an error of the file as a whole names it."""
        try:
            yield from self.source.read(self.path)
        except DataError as error:
            raise DataError(f"{self.name}: {error.what}", error.why, error.next) from error

    def identity(self) -> list[object]:
        """What the rows depend on: the bytes of the file and every setting of the entry, not its path."""
        with self.path.open("rb") as file:
            return [hashlib.file_digest(file, "blake2b").hexdigest(), dict(self.settings)]


def open_entry(ctx: Context, split: Split, index: int, processor: Processor) -> OpenedEntry:
    """Check one entry of the config and open it."""
    section = ctx.section(DataConfig)
    entry: DatasetEntry = getattr(section, split)[index]
    place = _Place(ctx, ("data", split, index))
    path = place.file(entry.path)
    source = place.source(entry, path)
    form: Format = _imported(place.item("format", entry.format))
    options = validate(form.options, dict(entry.options), ctx.config.layer, (*place.at, "options"))
    fields = place.fields(entry, form)
    settings = {
        "fields": fields,
        "format": entry.format,
        "options": options.model_dump(mode="json"),
        "limit": entry.limit,
    }
    render = form.open(fields, options, processor)
    return OpenedEntry(_shown(path), path, source, render, entry.limit, section.columns, settings)


@dataclass(frozen=True)
class _Place:
    """Where an entry stands in the config, so that messages can name it."""

    ctx: Context
    at: tuple[str | int, ...]

    def origin(self, *keys: str) -> str:
        """`train.yaml:7`."""
        return str(self.ctx.config.layer.origin((*self.at, *keys)))

    def key(self, name: str) -> str:
        """`data.train.0.path`, as an override writes it."""
        return ".".join(map(str, (*self.at, name)))

    def file(self, written: str) -> Path:
        path = self.ctx.config.path(written)
        if path.is_file():
            return path
        folder = path if path.is_dir() else path.parent
        why = f"There is no folder {folder}."
        if folder.is_dir():
            files = sorted(file.name for file in folder.iterdir() if file.is_file())
            why = did_you_mean(path.name, files, "The folder holds:")
        raise DataError(
            f"{_shown(path)} {'is a folder' if path.is_dir() else 'does not exist'} ({self.origin('path')})",
            why,
            f"Correct {self.key('path')}; relative paths start at {self.ctx.config.folder}.",
        )

    def source(self, entry: DatasetEntry, path: Path) -> Source:
        if entry.source is not None:
            named: Source = _imported(self.item("source", entry.source))
            return named
        sources: dict[str, Source] = {n: _imported(item) for n, item in self.ctx.items("source").items()}
        for source in sources.values():
            if path.name.lower().endswith(source.suffixes):
                return source
        known = sorted(suffix for source in sources.values() for suffix in source.suffixes)
        raise DataError(
            f"{_shown(path)}: no source reads files that end in '{path.suffix}' ({self.origin('path')})",
            f"Known endings: {', '.join(known)}.",
            f"Convert the file, or set {self.key('source')} to one of {', '.join(sorted(sources))}.",
        )

    def item(self, kind: str, name: str) -> Item:
        items = self.ctx.items(kind)
        if name in items:
            return items[name]
        raise ConfigError(
            f"there is no {kind} '{name}' ({self.origin(kind)})",
            did_you_mean(name, items, "Active plugins declare:"),
            f"Correct {self.key(kind)}, or add the plugin that declares it to plugins.",
        )

    def fields(self, entry: DatasetEntry, form: Format) -> dict[str, str]:
        for name in entry.fields:
            if name not in form.fields:
                raise ConfigError(
                    f"format '{entry.format}' has no field '{name}' ({self.origin('fields', name)})",
                    did_you_mean(name, form.fields, "Its fields:"),
                    "Write the format's name of the field left of the colon, the file's name right of it.",
                )
        return {**form.fields, **entry.fields}


def _imported(item: Item) -> Any:
    """The target of an item: an object, or the one that `package.module:attribute` names."""
    if not isinstance(item.target, str):
        return item.target
    module, _, attribute = item.target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
