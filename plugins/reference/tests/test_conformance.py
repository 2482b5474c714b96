"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from pegbox.testing import PluginConformance


class TestReference(PluginConformance):
    plugin = "reference"
