"""A section with a model inside that accepts unknown keys."""

from __future__ import annotations

from pegbox.section import Section, setting
from pydantic import BaseModel, ConfigDict


class Limits(BaseModel):
    """A plain model of pydantic: it ignores unknown keys."""

    model_config = ConfigDict(frozen=True)

    low: float = setting(0.0, "The lowest result.", unit="1")


class SampleConfig(Section):
    """Two settings."""

    rate: float = setting(0.5, "How much.", unit="1")
    limits: Limits = setting(Limits(), "Bounds of the result.")
