"""The section `early-stopping` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting


class EarlyStoppingConfig(Section):
    """When a run has stopped improving."""

    metric: str = setting("eval_loss", "A metric of the evaluations.", min_length=1)
    better: Literal["lower", "higher"] = setting("lower", "Which way of the metric is an improvement.")
    patience: int = setting(3, "Evaluations in a row without an improvement after which the run stops.", ge=1)
    min_delta: float = setting(0.0, "A change has to be larger than this to be an improvement.", ge=0)
