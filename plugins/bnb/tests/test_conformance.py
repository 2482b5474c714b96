from __future__ import annotations

from pegbox.testing import PluginConformance


class TestBnb(PluginConformance):
    plugin = "bnb"
