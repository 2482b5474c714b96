"""The section `dpo` of a config, and which of its settings act on which loss: one that acts on none is an error."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Literal

from pegbox.errors import ConfigError, DataError
from pegbox.rows import ExampleStream
from pegbox.section import Section, setting
from pydantic import model_validator

if TYPE_CHECKING:
    from pegbox.rows import Dataset

LossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
PAIR = (1, -1)
"""The signs of a row: its answers in order, chosen and rejected."""
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

REFERENCE = "reference_logps"
SORTED = frozenset({"aot", "aot_unpaired"})
SMOOTHED = frozenset({"sigmoid", "exo_pair", "robust"}) | SORTED
OF_DIFFERENCES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"})
"""Losses of the difference of two scores: in all others, the normaliser of an f-divergence would not cancel."""


class DpoConfig(Section):
    """Direct preference optimisation over pairs of answers."""

    loss: LossName | Mapping[LossName, float] = setting(
        "sigmoid", "The loss of a pair by name, or several with their weights, e.g. `{sigmoid: 0.8, sft: 1.0}`."
    )
    beta: float = setting(
        0.1,
        "How strongly the policy is held to the reference; in `ipo` it is the paper's tau, and larger holds more.",
        unit="1",
        gt=0,
    )
    label_smoothing: float = setting(
        0.0,
        "Share of pairs whose labels are assumed to be flipped, in `sigmoid` (conservative DPO), `robust`, `aot` and "
        "`aot_unpaired`; the paper's epsilon in `exo_pair`, which needs one (1e-3).",
        unit="1",
        ge=0,
        lt=0.5,
    )
    f_divergence: Divergence = setting(
        "reverse_kl", "The divergence from the reference that is held small; others than reverse_kl: f-DPO."
    )
    f_alpha: float = setting(0.5, "Alpha of `alpha_divergence`; 1 is reverse_kl.", unit="1", ge=0)
    ld_alpha: float | None = setting(
        None,
        "LD-DPO: weight of the tokens of the longer answer beyond the length of the shorter one; not set: 1.",
        unit="1",
        ge=0,
        le=1,
    )
    use_weighting: bool = setting(
        False, "WPO: weigh each pair by how likely the policy finds its two answers; needs whole logits."
    )
    discopop_tau: float = setting(0.05, "Temperature of the blend in `discopop`.", unit="1", gt=0)
    token_metrics: bool = setting(
        False, "Log `entropy`, `mean_token_accuracy` and `logits/*` as well; needs whole logits."
    )

    @property
    def weights(self) -> dict[str, float]:
        """The losses with their weights."""
        weights: Mapping[str, float] = {self.loss: 1.0} if isinstance(self.loss, str) else self.loss  # type: ignore[assignment]
        return dict(weights)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with a reference."""
        return self.weights.keys() != {"sft"}

    @model_validator(mode="after")
    def _weights_are_positive(self) -> DpoConfig:
        wrong = {name: weight for name, weight in self.weights.items() if not 0 < weight < float("inf")}
        if wrong or not self.weights:
            raise ValueError(f"loss is {self.loss!r}: name at least one loss, each with a weight above 0")
        return self

    @model_validator(mode="after")
    def _settings_act(self) -> DpoConfig:
        losses = set(self.weights)
        acts = {
            "beta": losses - {"sft"},
            "label_smoothing": losses & SMOOTHED,
            "f_divergence": losses & OF_DIFFERENCES,
            "f_alpha": {self.f_divergence} & {"alpha_divergence"},
            "ld_alpha": losses - {"sft"},
            "discopop_tau": losses & {"discopop"},
        }
        for name, on in acts.items():
            if getattr(self, name) != type(self).model_fields[name].default and not on:
                raise ValueError(f"{name} is set, and nothing here uses it (loss: {', '.join(losses)}): remove it")
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> DpoConfig:
        losses = set(self.weights)
        if "exo_pair" in losses and self.label_smoothing == 0:
            raise ValueError("exo_pair takes the logarithm of label_smoothing: set it above 0 (the paper: 1e-3)")
        if self.f_divergence != "reverse_kl" and (wrong := losses - OF_DIFFERENCES - {"sft"}):
            raise ValueError(
                f"f_divergence is {self.f_divergence}, and {', '.join(sorted(wrong))} is not a function of the "
                "difference of two scores, in which the divergence's normaliser cancels: remove one of them"
            )
        if self.use_weighting and (wrong := losses & (SORTED | {"sft"})):
            raise ValueError(f"use_weighting weighs pairs, which {', '.join(sorted(wrong))} takes apart: remove one")
        return self


def require_reference(config: DpoConfig, extras: Container[str]) -> None:
    """Raise unless some plugin declares the reference's log-probabilities.

    Raises:
        ConfigError: none does, and a loss compares with them.
    """
    if config.needs_reference and REFERENCE not in extras:
        raise ConfigError(
            "dpo needs the log-probabilities of a reference model, and no plugin brings them",
            "Its loss compares how much likelier an answer became with how likely the reference finds it.",
            "Add reference to plugins; a loss without a reference is in the plugins orpo, cpo and simpo.",
        )


def require_pair_rows(rows: Dataset) -> None:
    """Raise if the first row is no pair; a stream and later rows are looked at when they are batches.

    Raises:
        DataError: naming the row.
    """
    if not isinstance(rows, ExampleStream) and len(rows) and rows[0].signs != PAIR:
        raise DataError(
            f"{rows.describe(0)} is no pair of a chosen and a rejected answer",
            "dpo compares the two answers of each row.",
            "Give the data the format preference; or take another loss: kto for answers that stand alone.",
        )
