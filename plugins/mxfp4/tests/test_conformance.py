"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PluginConformance


class TestMxfp4(PluginConformance):
    plugin = "mxfp4"
    config: ClassVar = {"quantize": True}
