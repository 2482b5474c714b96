"""The section `reward` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class RewardConfig(Section):
    """Training of an outcome reward model on preferences. The rows are pairs: chosen, then rejected."""

    margin: bool = setting(
        False,
        "Ask for a difference of at least the pair's margin: the column `margin` of the rows, a number that "
        "`data.columns: [margin]` keeps.",
    )
    center: float = setting(
        0.0, "Weight of the mean of (chosen + rejected)², which keeps rewards around zero; 0.01 is usual.", ge=0.0
    )
