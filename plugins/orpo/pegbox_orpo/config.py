"""The section `orpo` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class OrpoConfig(Section):
    """How much the odds ratio weighs beside the likelihood."""

    alpha: float = setting(
        0.1, "Weight of the odds-ratio term (the paper's lambda, beta in TRL); the likelihood's is 1.", unit="1", ge=0
    )
