"""The section `row-losses` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting

RankBy = Literal["mean", "last"]


class RowLossesConfig(Section):
    """Which rows are listed, and in which order."""

    keep: int | None = setting(100, "How many rows are listed, highest loss first; null lists all.", unit="rows", ge=1)
    rank_by: RankBy = setting(
        "mean",
        "Order by the mean over all visits of a row (as dataset cartography does), or by its last visit.",
    )
    min_tokens: int = setting(
        1, "Leave out rows with fewer trained tokens: the mean of a few tokens says little.", unit="tokens", ge=1
    )
