"""Data files and datasets as tokenized rows, with loss masks that are right by construction.

Sources read rows, formats turn rows into text and say which characters are trained; both are declared as
items, so that other plugins add their own. The text is tokenized once and whole, and kept in flat arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import RunEnded, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.events import Event
    from pegbox.rows import Examples, Split
    from pegbox.types import Processor

    from pegbox_data.loading import Datasets
    from pegbox_data.stream import RowStream


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
            item("source", "text", "sources:text", "Plain text: a row for each line, or for each file."),
            item("source", "parquet", "columnar:parquet", "Apache Parquet."),
            item("source", "arrow", "columnar:arrow", "Arrow files and streams."),
            item("source", "hub", "hub:hub", "Datasets of the hub, through the library `datasets`."),
            item("source", "synthetic", "synthetic:synthetic", "Random conversations, for benchmarks."),
            item("format", "chat", "chat:chat", "Conversations in OpenAI's layout, through the chat template."),
            item("format", "completion", "completion:completion", "A prompt and its completion."),
            item("format", "alpaca", "instruct:alpaca", "An instruction, perhaps with an input, and its output."),
            item("format", "input_output", "segments:input_output", "Segments of text, each trained or not."),
            item("format", "pretraining", "documents:pretraining", "Plain text, all of it trained."),
            item("format", "tokens", "tokens:tokens", "Rows that were tokenized elsewhere."),
            item("format", "preference", "preference:preference", "A prompt with a chosen and a rejected answer."),
            item("format", "unpaired", "unpaired:unpaired", "A prompt with an answer that is wanted or not."),
            item("format", "prompts", "prompts:prompts", "Prompts to be answered while training."),
            item("format", "steps", "steps:stepwise", "Steps of an answer with a verdict on each."),
        )

    @hookimpl
    def build_dataset(self, ctx: Context, processor: Processor, split: Split) -> Examples | RowStream | None:
        from pegbox_data.loading import Datasets

        if self._datasets is None:
            self._datasets = Datasets(ctx, processor)
        return self._datasets.split(split)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        """Print what became of the rows: processes know who prints once the run has begun."""
        if self._datasets is None or not isinstance(event, RunStarted | RunEnded):
            return
        lines = self._datasets.report if isinstance(event, RunStarted) else self._datasets.stream_report()
        if ctx.runtime.rank == 0:
            for line in lines:
                ctx.log.info("data: %s", line)
