"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PluginConformance


class TestScattermoe(PluginConformance):
    plugin = "scattermoe"
    config: ClassVar = {"save": "none"}
