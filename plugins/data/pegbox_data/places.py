"""What an entry of the config names: files, folders, addresses, hub datasets; and messages that say where it stands."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.config import validate
from pegbox.errors import ConfigError, DataError, did_you_mean

from pegbox_data.declared import imported
from pegbox_data.elsewhere import here
from pegbox_data.files import DataFile, local_files, of_split, remote_files, shown
from pegbox_data.slices import SplitSlice, parse_split
from pegbox_data.sources import START, Entry, Place

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Item

    from pegbox_data.config import DatasetEntry
    from pegbox_data.files import DigestMemo
    from pegbox_data.formats import Format
    from pegbox_data.sources import FileSource, Part

SMALL_BYTES = 1 << 20
"""A file of this size is tokenized in about a second: keeping that would gain nothing."""
WHOLE = SplitSlice("", "", "")


@dataclass(frozen=True)
class FilePart:
    """The rows of one file."""

    file: DataFile
    source: FileSource
    options: Any

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def is_small(self) -> bool:
        size = self.file.size
        return size is not None and size < SMALL_BYTES and not self.file.is_compressed

    def read(self, start: Place = START) -> Iterator[Entry]:
        """The rows of the file; an error of the file as a whole names it."""
        try:
            yield from self.source.read(self.file, self.options, start)
        except DataError as error:
            raise DataError(f"{self.name}: {error.what}", error.why, error.next) from error
        except (OSError, EOFError, zlib.error) as error:  # of the system, or of what uncompresses
            kind = "uncompressed" if self.file.is_compressed else "read"
            remedy = "Write the file again; or rename it, if it is not compressed." * self.file.is_compressed
            raise DataError(
                f"{self.name} cannot be {kind}",
                f"What reads it says: {str(error) or type(error).__name__}.",
                remedy or "Check the file and who may read it.",
            ) from error

    def identity(self, memo: DigestMemo) -> object:
        return self._with_source(self.file.digest(memo))

    def sketch(self) -> object:
        return self._with_source(self.file.sketch())

    def _with_source(self, content: str) -> object:
        source = type(self.source)
        # The suffix tells how a file is compressed, and a source may read it too (.tsv).
        suffix = self.file.address.rpartition(".")[2].lower()
        return [content, suffix, source.__module__, source.__qualname__, self.options.model_dump(mode="json")]


@dataclass(frozen=True)
class EntryPlace:
    """Where an entry stands in the config, so that messages can name it."""

    ctx: Context
    at: tuple[str | int, ...]

    def origin(self, *keys: str) -> str:
        """`train.yaml:7`."""
        return str(self.ctx.config.layer.origin((*self.at, *keys)))

    def key(self, name: str) -> str:
        """`data.train.0.path`, as an override writes it."""
        return ".".join(map(str, (*self.at, name)))

    def parts(self, entry: DatasetEntry, streaming: bool) -> tuple[list[Part], SplitSlice]:
        """What an entry names, and which of its rows."""
        wanted = parse_split(entry.split) if entry.split is not None else WHOLE
        if entry.source is not None:
            source = imported(self.item("source", entry.source))
            options = self._source_options(entry, source)
            if hasattr(source, "parts"):
                self._only_for_hub(entry, "" if entry.source == "hub" else f"source {entry.source}")
                # The hub's library cuts slices itself, unless it streams.
                rest = WHOLE if entry.source == "hub" and not streaming else wanted
                return list(source.parts(entry, options, streaming)), rest
            return [part for path in entry.paths for part in self._files(entry, path, wanted, source, options)], wanted
        found: list[Part] = []
        for path in entry.paths:
            if self._may_be_hub(path):
                from pegbox_data.hub import hub

                one = entry.model_copy(update={"path": path})
                found += hub.parts(one, hub.options(), streaming)
                if len(entry.paths) == 1:
                    return found, wanted if streaming else WHOLE
            else:
                self._only_for_hub(entry, f"{path}, which is no dataset of the hub")
                found += self._files(entry, path, wanted, None, None)
        return found, wanted

    def _source_options(self, entry: DatasetEntry, source: Any) -> Any:
        at = (*self.at, "source_options")
        return validate(source.options, dict(entry.source_options), self.ctx.config.layer, at)

    def _only_for_hub(self, entry: DatasetEntry, what: str) -> None:
        for key in ("name", "revision"):
            if what and getattr(entry, key) is not None:
                raise ConfigError(
                    f"{self.key(key)} means nothing for {what} ({self.origin(key)})",
                    "Only datasets of the hub have configurations and revisions.",
                    f"Remove {key}.",
                )

    def _may_be_hub(self, written: str) -> bool:
        """Whether a path looks like `org/name` and nothing local has this name."""
        path = self.ctx.config.path(written)
        parts = written.split("/")
        named = len(parts) == 2 and all(part and part[0] not in ".~" and part == part.strip() for part in parts)
        known = path.name.lower().endswith((*self._suffixes(), ".gz", ".zst"))
        return named and not known and not path.exists() and not path.parent.is_dir() and not set("*?[") & set(written)

    def _files(
        self, entry: DatasetEntry, written: str, wanted: SplitSlice, source: FileSource | None, options: Any
    ) -> list[Part]:
        if "://" in written:
            root, files = written, remote_files(written)
        else:
            path = self.ctx.config.path(written)
            if path.is_dir() and source is None:
                from pegbox_data.hub import is_saved, saved_rows

                if is_saved(path):
                    return [saved_rows(path, shown(path), wanted.name or None)]
            root, files = str(path), [DataFile(str(file), shown(file)) for file in local_files(path)]
        several = len(files) != 1 or files[0].address.rstrip("/") != root.rstrip("/")
        if several and source is None:
            files = [file for file in files if file.plain_name.endswith(self._suffixes())]
        if not files:
            raise self._nothing(written)
        if several and wanted.name:
            files = of_split(files, root, wanted.name) or (files if wanted.name == "train" else [])
        if not files or (not several and wanted.name not in ("", "train")):
            raise ConfigError(
                f"{written} has no split '{wanted.name}' ({self.origin('split')})",
                "A split of local files is a folder of its name, or files whose names begin with it.",
                f"Correct {self.key('split')}, or name the files in path.",
            )
        return [self._part(entry, file, source, options) for file in files]

    def _part(self, entry: DatasetEntry, file: DataFile, source: FileSource | None, options: Any) -> FilePart:
        if source is not None:
            return FilePart(file, source, options)
        for candidate in self._sources().values():
            if file.plain_name.endswith(candidate.suffixes):
                return FilePart(file, candidate, self._source_options(entry, candidate))
        known = sorted(self._suffixes())
        ending = Path(file.plain_name).suffix
        raise DataError(
            f"{file.name}: no source reads files that end in '{ending}' ({self.origin('path')})",
            f"Known endings: {', '.join(known)}.",
            f"Convert the file, or set {self.key('source')} to one of {', '.join(sorted(self._sources()))}.",
        )

    def _sources(self) -> dict[str, FileSource]:
        sources = {name: imported(item) for name, item in self.ctx.items("source").items()}
        return {name: source for name, source in sources.items() if hasattr(source, "suffixes")}

    def _suffixes(self) -> tuple[str, ...]:
        return tuple(suffix for source in self._sources().values() for suffix in source.suffixes)

    def _nothing(self, written: str) -> DataError:
        """The error for a path that names no file."""
        change = f"Correct {self.key('path')}; relative paths start at {self.ctx.config.folder}."
        if "://" in written:
            return DataError(f"{written} names no file ({self.origin('path')})", "Nothing lies there.", change)
        path = self.ctx.config.path(written)
        if path.is_dir():
            files = sorted(file.name for file in path.iterdir() if file.is_file())
            holds = f"It holds: {', '.join(files[:20]) or 'nothing'}."
            return DataError(f"{shown(path)} is a folder without data files ({self.origin('path')})", holds, change)
        why = f"There is no folder {path.parent}."
        if path.parent.is_dir():
            files = sorted(file.name for file in path.parent.iterdir() if file.is_file())
            why = did_you_mean(path.name, files, "The folder holds:")
        return DataError(f"{shown(path)} does not exist ({self.origin('path')})", why, change)

    def item(self, kind: str, name: str) -> Item:
        items = self.ctx.items(kind)
        if name in items:
            return items[name]
        same = here(name) if kind == "format" else None
        raise ConfigError(
            f"there is no {kind} '{name}' ({self.origin(kind)})",
            f"Here it is {same}." if same else did_you_mean(name, items, "Active plugins declare:"),
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
