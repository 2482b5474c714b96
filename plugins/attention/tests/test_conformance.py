"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from document_batches import Run
from pegbox.testing import PatchConformance, PluginConformance
from pegbox.types import Model


class TestAttention(PluginConformance, PatchConformance):
    plugin = "attention"
    config: ClassVar = {"implementation": "pegbox"}

    @pytest.fixture(autouse=True)
    def _loader(self, load: Callable[..., Run]) -> None:
        self._load = load

    def model(self) -> Model:
        """As `hf` loads it with what this plugin asks for, not patched yet."""
        run = self._load("mistral", "pegbox")
        run.log.undo()
        return run.model


class TestOfTransformers(PatchConformance):
    plugin = "attention"
    config: ClassVar = {"implementation": "sdpa"}
