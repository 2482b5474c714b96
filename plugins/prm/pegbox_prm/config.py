"""The section `prm` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class PrmConfig(Section):
    """Training of a process reward model. The rows mark one token behind each step, and keep the steps' verdicts."""

    column: str = setting(
        "labels",
        "Column with a verdict, true or false, for each marked token; the format `steps` keeps `labels`.",
        min_length=1,
    )
