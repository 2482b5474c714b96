"""The section `neftune` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class NeftuneConfig(Section):
    """How strong the noise is."""

    alpha: float = setting(
        5.0,
        "Strength: noise is uniform within alpha / sqrt(length * width); the paper tries 5, 10 and 15.",
        unit="1",
        gt=0,
    )
