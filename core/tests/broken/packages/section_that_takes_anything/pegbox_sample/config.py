"""A section that accepts unknown keys."""

from __future__ import annotations

from pegbox.section import Section, setting


class SampleConfig(Section, extra="ignore"):
    """Two settings."""

    rate: float = setting(0.5, "How much.", unit="1")
    limits: float = setting(0.0, "Bounds of the result.", unit="1")
