"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from pegbox.testing import PatchConformance, PluginConformance
from pegbox.types import Model


class TestChunkedCrossEntropy(PluginConformance, PatchConformance):
    plugin = "chunked-cross-entropy"
    config: ClassVar = {"chunk": 5}

    @pytest.fixture(autouse=True)
    def _loader(self, load: Callable[..., Model]) -> None:
        self._load = load

    def model(self) -> Model:
        return self._load("plain")
