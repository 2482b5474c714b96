from __future__ import annotations

from pegbox.testing import PluginConformance


class TestFsdp(PluginConformance):
    plugin = "fsdp"
