"""The section `simpo` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class SimpoConfig(Section):
    """How sharply answers are told apart and by how much, and further terms that others have added."""

    beta: float = setting(
        2.0, "Scale of the reward, which is beta times the mean log-probability per token.", unit="1", gt=0
    )
    gamma: float = setting(
        1.0, "Target margin between the rewards of two answers; the paper takes 0.3 to 1.6.", unit="1", ge=0
    )
    label_smoothing: float = setting(
        0.0, "Share of pairs that are believed to be the wrong way round.", unit="1", ge=0, lt=0.5
    )
    sft_weight: float = setting(
        0.0,
        "Weight of the likelihood of wanted answers (CPO-SimPO; cpo_alpha in TRL); 0 leaves it out.",
        unit="1",
        ge=0,
    )
    alpha: float = setting(
        0.0, "Shape of the reward, (1 - p^-alpha) / alpha, as AlphaPO has it (0.25 in its paper); 0 is log p.", unit="1"
    )
