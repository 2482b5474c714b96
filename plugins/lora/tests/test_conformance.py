from __future__ import annotations

from pegbox.testing import PluginConformance


class TestLora(PluginConformance):
    plugin = "lora"
