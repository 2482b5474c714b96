"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from typing import ClassVar

from adapted_models import adapted
from pegbox.testing import PatchConformance, PluginConformance
from pegbox.types import Model


class TestLoraKernels(PluginConformance, PatchConformance):
    plugin = "lora-kernels"

    def model(self) -> Model:
        return adapted()


class TestInputAlone(PatchConformance):
    plugin = "lora-kernels"
    config: ClassVar = {"mlp_keeps": "input", "qkv": False}

    def model(self) -> Model:
        return adapted(use_dora=True)
