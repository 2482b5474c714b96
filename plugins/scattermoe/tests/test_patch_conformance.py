"""Its patches keep the contract of patches, on mixtures that the plugin `hf` loads."""

from __future__ import annotations

from mixtures import loaded
from pegbox.testing import PatchConformance
from pegbox.types import Model


class TestPatchOfSwiglu(PatchConformance):
    plugin = "scattermoe"

    def model(self) -> Model:
        return loaded("qwen3_moe")


class TestPatchOfGptOss(PatchConformance):
    plugin = "scattermoe"

    def model(self) -> Model:
        return loaded("gpt_oss")
