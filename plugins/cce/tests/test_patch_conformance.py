"""Its patch keeps the contract of patches, on a model that the plugin `hf` loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from pegbox.testing import PatchConformance
from pegbox.types import Model


class TestPatch(PatchConformance):
    plugin = "cce"
    config: ClassVar = {"logits_gib": 1e-5}

    @pytest.fixture(autouse=True)
    def _loader(self, load: Callable[..., Model]) -> None:
        self._load = load

    def model(self) -> Model:
        return self._load("plain")
