"""A default that JSON cannot hold."""

from __future__ import annotations

from pegbox.section import Section, setting


class SampleConfig(Section):
    """Two settings."""

    rate: float = setting(float("inf"), "How much.", unit="1")
    limits: float = setting(0.0, "Bounds of the result.", unit="1")
