"""A section with a setting that is not documented."""

from __future__ import annotations

from pegbox.section import Section, setting


class SampleConfig(Section):
    """Two settings."""

    rate: float = 0.5
    limits: float = setting(0.0, "Bounds of the result.", unit="1")
