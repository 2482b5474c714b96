"""The source `hub`: datasets of the hub, and folders written by `save_to_disk`, through the `datasets` library.

The library is imported when such a dataset is opened and not before. Its own fingerprint of a prepared dataset is the
identity of the rows; streamed datasets keep their place in the library's own state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pegbox.errors import DataError

from pegbox_data.slices import parse_split
from pegbox_data.sources import START, Entry, NoOptions, Place

if TYPE_CHECKING:
    from pathlib import Path

    from pegbox_data.config import DatasetEntry
    from pegbox_data.files import DigestMemo

STATE_ROWS = 1000
"""A streamed dataset's state is taken every so many rows; going on reads at most as many again."""


class Hub:
    """Datasets of the hub; `path` is `org/name`."""

    options = NoOptions

    def parts(self, entry: DatasetEntry, options: NoOptions, streaming: bool) -> Sequence[HubRows | StreamedRows]:
        datasets = library(entry.paths[0] if entry.paths else "hub")
        return [part for path in entry.paths for part in self._parts(datasets, path, entry, streaming)]

    def _parts(
        self, datasets: Any, path: str, entry: DatasetEntry, streaming: bool
    ) -> Iterator[HubRows | StreamedRows]:
        split = entry.split or "train"
        wanted = parse_split(split)
        split = split if wanted.name else f"train{split}"
        if streaming and not wanted.whole:
            split = wanted.name or "train"
        try:
            opened = datasets.load_dataset(path, entry.name, split=split, revision=entry.revision, streaming=streaming)
        except Exception as error:  # network, authentication, unknown names: each library raises its own
            offline = datasets.config.HF_HUB_OFFLINE
            raise DataError(
                f"the dataset '{path}' cannot be opened",
                f"Tried: a local file or folder of this name (there is none), then the hub"
                f"{' (which is switched off: HF_HUB_OFFLINE)' if offline else ''}, configuration "
                f"{entry.name or 'default'}, split {split}, revision {entry.revision or 'main'}. "
                f"datasets says: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                "Correct the path, or download the dataset and name its folder.",
            ) from error
        yield (
            StreamedRows(opened, path, f"{entry.name}@{entry.revision}", split) if streaming else HubRows(opened, path)
        )


@dataclass(frozen=True)
class HubRows:
    """A prepared dataset: an Arrow table on disk."""

    dataset: Any
    name: str
    is_small: bool = False

    def read(self, start: Place = START) -> Iterator[Entry]:
        table = self.dataset.with_format("arrow")
        for at in range(start.offset, len(self.dataset), STATE_ROWS):
            for number, row in enumerate(table[at : at + STATE_ROWS].to_pylist(), at + 1):
                yield Entry(number, row, None, Place(number, number))

    def identity(self, memo: DigestMemo) -> object:
        return ["datasets", self.dataset._fingerprint]

    def sketch(self) -> object:
        return ["datasets", self.dataset._fingerprint]


@dataclass(frozen=True)
class StreamedRows:
    """A dataset that is read while it is used."""

    dataset: Any
    name: str
    configuration: str
    split: str
    is_small: bool = False

    def read(self, start: Place = START) -> Iterator[Entry]:
        token: dict[str, Any] = json.loads(start.token) if start.token else {"state": None, "rows": 0}
        state, before = token["state"], int(token["rows"])
        dataset = self.dataset.with_format(None)
        if state is not None:
            dataset.load_state_dict(state)
        for number, row in enumerate(dataset, before + 1):
            if number > start.offset:
                yield Entry(number, row, None, Place(number, number, json.dumps(token)))
            if number % STATE_ROWS == 0:
                token = {"state": dataset.state_dict(), "rows": number}

    def identity(self, memo: DigestMemo) -> object:
        return self.sketch()

    def sketch(self) -> object:
        return ["datasets", self.name, self.configuration, self.split, str(self.dataset.info.download_checksums)]


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`: one dataset, or several splits."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_rows(folder: Path, name: str, split: str | None) -> HubRows:
    """The rows of a folder that `save_to_disk` wrote."""
    datasets = library(name)
    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files: the library raises what its readers raise
        raise DataError(
            f"{name} cannot be opened", f"datasets says: {type(error).__name__}: {error}", "Save the dataset again."
        ) from error
    if isinstance(opened, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in opened:
            raise DataError(
                f"{name} has no split '{wanted}'",
                f"It has: {', '.join(opened)}.",
                "Set the entry's split to one of them.",
            )
        opened = opened[wanted]
    elif split not in (None, "train"):
        raise DataError(
            f"{name} has no split '{split}'", "It is one dataset, saved without splits.", "Remove the entry's split."
        )
    return HubRows(opened, name)


def library(path: str) -> Any:
    """The `datasets` library."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}: the library `datasets` is not installed",
            "Datasets of the hub and folders written by save_to_disk are read with it.",
            "Type: pip install 'pegbox-data[hub]'",
        ) from error
    return datasets


hub = Hub()
