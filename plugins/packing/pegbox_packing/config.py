"""The section `packing` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class PackingConfig(Section):
    """How long the rows of a batch become, and among how many rows bins are looked for."""

    length: int = setting(..., "Capacity of a bin: the longest row that packing makes.", unit="tokens", ge=2)
    window: int = setting(
        32768,
        "Rows of the shuffled order that are packed among themselves; more of them leave less padding.",
        unit="rows",
        ge=1,
    )
    eval: bool = setting(True, "Pack the held-out rows too; their loss is the same either way.")
