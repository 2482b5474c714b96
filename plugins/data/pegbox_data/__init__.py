"""Local data files as tokenized rows, with loss masks that are right by construction.

Sources read files, formats turn rows into text and say which characters are trained; both are declared as
items, so that other plugins add their own. The text is tokenized once and whole, and kept in flat arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Examples, Processor, Split

    from pegbox_data.loading import Datasets


class DataPlugin:
    """Owner of `build_dataset`; declares the sources and formats that come with it."""

    def __init__(self) -> None:
        self._datasets: Datasets | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_data.config import DataConfig

        return ConfigSection(schema=DataConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        def item(kind: str, name: str, target: str, doc: str) -> Item:
            return Item(kind=kind, name=name, target=f"pegbox_data.{target}", doc=doc)

        return (
            item("source", "jsonl", "sources:jsonl", "JSON Lines: one object per line."),
            item("source", "json", "sources:json_array", "One JSON array of objects."),
            item("source", "csv", "sources:comma_separated", "Comma-separated values with a header line."),
            item("source", "parquet", "sources:parquet", "Apache Parquet."),
            item("format", "chat", "chat:chat", "Conversations in OpenAI's layout, through the chat template."),
            item("format", "completion", "completion:completion", "A prompt and its completion."),
        )

    @hookimpl
    def build_dataset(self, ctx: Context, processor: Processor, split: Split) -> Examples | None:
        from pegbox_data.loading import Datasets

        if self._datasets is None:
            self._datasets = Datasets(ctx, processor)
        return self._datasets.split(split)
