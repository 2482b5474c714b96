"""A third-party library is imported with the plugin; here one that pytest brings."""

from __future__ import annotations

from collections.abc import Sequence

import iniconfig
from pegbox.hooks import hookimpl
from pegbox.types import Item


class SamplePlugin:
    """Any library costs time whenever a plan is made."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="sample", name="one", target=iniconfig.IniConfig)]
