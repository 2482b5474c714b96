"""The section `cosine-reward` of a config. The defaults are the paper's."""

from __future__ import annotations

from pegbox.section import Section, setting


class CosineRewardConfig(Section):
    """The reward as a function of the length of a completion."""

    answer_column: str = setting("answer", "Column of the source row that holds the right answer.")
    max_tokens: int = setting(1024, "L: a completion of this length counts as cut off.", unit="tokens", gt=0)
    right: tuple[float, float] = setting((2.0, 1.0), "Reward of a right answer at length 0 and at L.", unit="1")
    wrong: tuple[float, float] = setting((-10.0, 0.0), "Reward of a wrong answer at length 0 and at L.", unit="1")
    cut_off: float = setting(-10.0, "Reward of a completion that was cut off.", unit="1")
