"""A section that is written in another unit than it is read in."""

from __future__ import annotations

from pegbox.section import Section, setting
from pydantic import field_serializer


class SampleConfig(Section):
    """Two settings."""

    rate: float = setting(0.5, "How much.", unit="1")
    limits: float = setting(0.0, "Bounds of the result.", unit="1")

    @field_serializer("rate")
    def _as_percent(self, rate: float) -> float:
        return rate * 100
