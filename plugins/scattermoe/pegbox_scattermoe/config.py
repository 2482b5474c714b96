"""The section `scattermoe` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting


class ScattermoeConfig(Section):
    """How the products with the experts' weights are computed, and what is kept of them."""

    base: Literal["auto", "grouped_mm", "triton"] = setting(
        "auto",
        "What multiplies rows with the experts' weights: torch's `grouped_mm`, our `triton` kernel, or `auto`: the "
        "former in bfloat16 on Hopper and newer where it takes these weights, else the latter.",
    )
    save: Literal["preactivation", "none"] = setting(
        "preactivation",
        "What is kept for the backward beside the inputs: the first product of each row; with `none` it is computed "
        "again.",
    )
