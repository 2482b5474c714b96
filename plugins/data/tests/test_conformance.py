"""The rules that every plugin keeps."""

from __future__ import annotations

from pegbox.testing import PluginConformance


class TestData(PluginConformance):
    plugin = "data"
