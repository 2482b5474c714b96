"""The section `early-stopping` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator


class EarlyStoppingConfig(Section):
    """When a run has stopped improving."""

    metric: str = setting("eval_loss", "A metric of the evaluations.", min_length=1)
    better: Literal["lower", "higher"] | None = setting(
        None, "Which way of the metric is an improvement; not set: lower, if its name ends in `loss`."
    )
    patience: int = setting(3, "Evaluations in a row without an improvement after which the run stops.", ge=1)
    min_delta: float = setting(0.0, "A change has to be larger than this to be an improvement.", ge=0)

    @model_validator(mode="after")
    def _better_is_said(self) -> EarlyStoppingConfig:
        if self.better is None and not self.metric.endswith("loss"):
            raise ValueError(
                f"metric is {self.metric}, and better does not say which way it improves: set it to higher or lower"
            )
        return self
