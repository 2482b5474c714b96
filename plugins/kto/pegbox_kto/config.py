"""The section `kto` of a config, and what a run with it needs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pegbox.errors import ConfigError
from pegbox.section import Section, setting
from pydantic import model_validator

REFERENCE = "reference_logps"
"""What the loss needs of each batch: the reference's log-probabilities of the trained tokens."""


class KtoConfig(Section):
    """Which loss weighs answers, how strongly the reference holds, and what wanted and unwanted answers weigh."""

    loss: Literal["kto", "apo_zero_unpaired"] = setting(
        "kto",
        "kto measures an answer against the policy's divergence from the reference, apo_zero_unpaired against zero: "
        "it raises wanted answers and lowers unwanted ones, with half the forwards.",
    )
    beta: float = setting(0.1, "How strongly the policy is held to the reference; larger is stronger.", unit="1", gt=0)
    desirable_weight: float = setting(
        1.0,
        "Weight of wanted answers; with many more of one kind, choose the weights such that weight times number of "
        "wanted ones is 1 to 4/3 times that of unwanted ones.",
        unit="1",
        ge=0,
    )
    undesirable_weight: float = setting(1.0, "Weight of unwanted answers.", unit="1", ge=0)

    @model_validator(mode="after")
    def _something_weighs(self) -> KtoConfig:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError("desirable_weight and undesirable_weight are both 0: nothing is trained; raise one")
        return self


def require_reference(config: KtoConfig, active: Sequence[str], providers: Sequence[str], own: str) -> None:
    """Raise unless a plugin brings the reference's log-probabilities, listed earlier if there is a KL term.

    Args:
        config: without a KL term the two may stand in any order.
        active: names of the plugins, in order.
        providers: those that declare the log-probabilities.
        own: the name of this plugin.

    Raises:
        ConfigError: no plugin does, or one that is listed later.
    """
    if not providers:
        raise ConfigError(
            "kto needs the log-probabilities of a reference model, and no plugin brings them",
            "Its loss compares how likely an answer is with how likely the reference finds it.",
            "Add reference to plugins, before kto.",
        )
    if config.loss == "kto" and active.index(providers[0]) > active.index(own):
        raise ConfigError(
            f"{own} is listed before {providers[0]}, which brings the log-probabilities of the reference",
            "The KL term needs them for documents that kto makes in each step: it has to come after, and they cannot "
            "be precomputed.",
            f"List {providers[0]} before {own} in plugins; or set kto.loss=apo_zero_unpaired, which has no KL term.",
        )
