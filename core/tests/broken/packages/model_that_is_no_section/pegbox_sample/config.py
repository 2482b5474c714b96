"""A model of pydantic that has all the options of a section but strictness."""

from __future__ import annotations

from pegbox.section import setting
from pydantic import BaseModel, ConfigDict


class SampleConfig(BaseModel):
    """Two settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float = setting(0.5, "How much.", unit="1")
    limits: float = setting(0.0, "Bounds of the result.", unit="1")
