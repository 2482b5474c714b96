from __future__ import annotations

from pegbox.testing import PluginConformance


class TestTemplates(PluginConformance):
    plugin = "templates"
