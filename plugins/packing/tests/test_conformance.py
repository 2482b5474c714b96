from __future__ import annotations

from pegbox.testing import PluginConformance


class TestPacking(PluginConformance):
    plugin = "packing"
    config = {"length": 64}  # noqa: RUF012
