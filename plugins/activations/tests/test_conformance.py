"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PatchConformance, PluginConformance


class TestActivations(PluginConformance, PatchConformance):
    plugin = "activations"


class TestOffload(PatchConformance):
    plugin = "activations"
    config: ClassVar = {"policy": "none", "offload": "cpu", "offload_min_bytes": 0}


class TestReentrant(PatchConformance):
    plugin = "activations"
    config: ClassVar = {"reentrant": True}


class TestAuto(PatchConformance):
    plugin = "activations"
    config: ClassVar = {"policy": "auto", "memory_gib": 1.0}


class TestKeptAttention(PatchConformance):
    plugin = "activations"
    config: ClassVar = {"keep": "attention"}
