from __future__ import annotations

from pegbox.testing import PluginConformance


class TestHf(PluginConformance):
    plugin = "hf"
