"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from document_batches import Run
from pegbox.testing import PatchConformance, PluginConformance
from pegbox.types import Model


class TestGptOssAttention(PluginConformance, PatchConformance):
    plugin = "gpt-oss-attention"
    config: ClassVar = {"backend": "auto"}

    @pytest.fixture(autouse=True)
    def _loader(self, load: Callable[..., Run]) -> None:
        self._load = load

    def model(self) -> Model:
        return self._load(None).model

    @pytest.mark.xfail(reason="one distribution brings it and attention, which share all backends", strict=True)
    def test_it_has_one_name(self) -> None:
        super().test_it_has_one_name()
