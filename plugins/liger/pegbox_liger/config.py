"""The section `liger` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

Where = bool | Literal["auto"]
FEATURES = ("rms_norm", "layer_norm", "swiglu", "geglu", "rope")


class LigerConfig(Section):
    """Which kernels of the library are used: `auto` where they fit, true: they must fit somewhere."""

    rms_norm: Where = setting("auto", "RMSNorm, with Gemma's weight around zero.")
    layer_norm: Where = setting("auto", "LayerNorm with weight and bias.")
    swiglu: Where = setting("auto", "The product of MLPs whose activation is SiLU.")
    geglu: Where = setting("auto", "The product of MLPs whose activation is GELU by its tanh formula.")
    rope: Where = setting(
        False, "Rotary embeddings of queries and keys. It binds a name anew in a copy of the attention's forward."
    )

    @model_validator(mode="after")
    def _something(self) -> LigerConfig:
        if not any(getattr(self, feature) for feature in FEATURES):
            raise ValueError(f"{', '.join(FEATURES)} are all off; nothing would be done; remove the plugin")
        return self
