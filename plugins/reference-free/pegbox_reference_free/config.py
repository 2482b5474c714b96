"""The sections `orpo`, `cpo` and `simpo` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator


class OrpoConfig(Section):
    """How much the odds ratio weighs beside the likelihood."""

    alpha: float = setting(
        0.1, "Weight of the odds-ratio term (the paper's lambda, beta in TRL); the likelihood's is 1.", unit="1", ge=0
    )


class CpoConfig(Section):
    """Which loss compares the answers, how sharply, and how much the likelihood of the wanted one weighs."""

    loss: Literal["sigmoid", "hinge", "ipo"] = setting(
        "sigmoid",
        "What compares two answers: sigmoid (the paper's), hinge (SLiC), or ipo on mean log-probabilities per token.",
    )
    beta: float = setting(
        0.1, "How sharply answers are told apart: it multiplies log-probabilities; for ipo its tau.", unit="1", gt=0
    )
    label_smoothing: float = setting(
        0.0, "Share of pairs that are believed to be the wrong way round; sigmoid only.", unit="1", ge=0, lt=0.5
    )
    sft_weight: float = setting(
        1.0, "Weight of the likelihood of wanted answers (cpo_alpha in TRL); 0 leaves it out.", unit="1", ge=0
    )
    alpha: float = setting(0.0, "Shape of the reward, (1 - p^-alpha) / alpha, as AlphaPO has it; 0 is log p.", unit="1")

    @model_validator(mode="after")
    def _smoothing_acts(self) -> CpoConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but loss is {self.loss}, which has none; "
                "remove it, or set loss to sigmoid"
            )
        return self


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
