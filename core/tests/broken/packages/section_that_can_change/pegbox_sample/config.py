"""A section that can be changed after it was read."""

from __future__ import annotations

from pegbox.section import Section, setting


class SampleConfig(Section, frozen=False):
    """Two settings."""

    rate: float = setting(0.5, "How much.", unit="1")
    limits: float = setting(0.0, "Bounds of the result.", unit="1")
