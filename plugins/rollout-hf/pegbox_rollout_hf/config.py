"""The section `rollout-hf` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting


class RolloutHfConfig(Section):
    """How completions are sampled in the process that trains."""

    batch: int = setting(
        128, "Completions that are sampled together; fewer need less memory for keys and values.", unit="rows", ge=1
    )
    continuous: Literal["auto", "on", "off"] = setting(
        "off",
        "transformers' continuous batching, where finished completions make room for waiting ones at once; `auto`: on "
        "a GPU, where it computes all that the run and the sampling ask for.",
    )
    cache_share: float | None = setting(
        None,
        "Memory that continuous batching may take for keys and values, as a share of what is free; "
        "transformers' own if not set.",
        unit="1",
        gt=0,
        lt=1,
    )
