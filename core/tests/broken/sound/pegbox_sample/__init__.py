"""A plugin with a section and an item."""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item


class SamplePlugin:
    """Declares."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_sample.config import SampleConfig

        return ConfigSection(schema=SampleConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="sample", name="one", target="pegbox_sample:SamplePlugin", doc="The first.")]
