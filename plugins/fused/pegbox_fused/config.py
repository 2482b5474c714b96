"""The section `fused` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

Where = bool | Literal["auto"]
FEATURES = ("norm", "mlp", "experts", "rope")


class FusedConfig(Section):
    """Which operations are computed in one pass: `auto` where they are found, true: they must be found."""

    norm: Where = setting("auto", "RMSNorm, with Gemma's weight around zero, and gated as in Qwen3-Next.")
    mlp: Where = setting("auto", "SwiGLU and GeGLU between the projections of MLPs; the projections stay as they are.")
    experts: Where = setting("auto", "The same between the projections of experts, and gpt-oss's clamped one.")
    rope: Where = setting(
        False, "Rotary embeddings of queries and keys. It binds a name anew in a copy of the attention's forward."
    )

    @model_validator(mode="after")
    def _something(self) -> FusedConfig:
        if not any(getattr(self, feature) for feature in FEATURES):
            raise ValueError("norm, mlp, experts and rope are all off; nothing would be done; remove the plugin")
        return self
