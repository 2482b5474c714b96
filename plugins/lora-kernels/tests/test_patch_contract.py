"""The patches keep their contract, on models that the plugin lora has adapted."""

from __future__ import annotations

from typing import ClassVar

from adapted_models import adapted
from pegbox.testing import PatchConformance
from pegbox.types import Model


class TestAll(PatchConformance):
    plugin = "lora-kernels"

    def model(self) -> Model:
        return adapted()


class TestInputAlone(PatchConformance):
    plugin = "lora-kernels"
    config: ClassVar = {"mlp_keeps": "input", "qkv": False}

    def model(self) -> Model:
        return adapted(use_dora=True)
