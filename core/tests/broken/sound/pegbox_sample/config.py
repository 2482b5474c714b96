"""The section of the sample."""

from __future__ import annotations

from pegbox.section import Section, setting


class Limits(Section):
    """A section inside the section."""

    low: float = setting(0.0, "The lowest result.", unit="1")


class SampleConfig(Section):
    """Two settings."""

    rate: float = setting(0.5, "How much.", unit="1")
    limits: Limits = setting(Limits(), "Bounds of the result.")
