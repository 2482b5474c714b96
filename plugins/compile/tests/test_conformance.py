"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PatchConformance, PluginConformance


class TestCompile(PluginConformance, PatchConformance):
    plugin = "compile"
    config: ClassVar = {"backend": "eager"}
