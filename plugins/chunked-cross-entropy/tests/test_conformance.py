"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PluginConformance


class TestChunkedCrossEntropy(PluginConformance):
    plugin = "chunked-cross-entropy"
    config: ClassVar = {"chunk": 5}
