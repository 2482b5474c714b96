"""The plugin keeps the contract of plugins and wrappers."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PluginConformance


class TestHub(PluginConformance):
    plugin = "hub"
    config: ClassVar = {"repo": "me/model"}
