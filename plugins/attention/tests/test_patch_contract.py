"""The patches of an implementation that is brought here keep their contract, on a model that hf loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from document_batches import Run
from pegbox.testing import PatchConformance
from pegbox.types import Model


class TestOwn(PatchConformance):
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
