"""Log-probabilities under the sampling temperature: the model's head sees hidden states divided by it.

A completion sampled at temperature T comes from softmax(logits / T), and the ratio of probabilities that the loss clips
is one of that distribution. For a head that is a projection without bias and without a soft cap, logits / T are the
logits of hidden states / T; so every head (plain, chunked, fused) gives them without knowing of T, and so does the
reference. Heads with a bias or a soft cap are refused.

Only the phase `learn` is tempered: an engine that compares its log-probabilities with the model's while it gets new
weights sees the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError
from pegbox.types import ModulePatch, Need, Outputs

if TYPE_CHECKING:
    from pegbox.context import Phase
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Module

HEAD = "token_head"
ROLES = ("policy", "reference")


class Tempering:
    """Whether log-probabilities are those at the sampling temperature; follows the phases of a run."""

    def __init__(self, temperature: float) -> None:
        self.temperature, self.learning = temperature, False

    def observe(self, phase: Phase) -> None:
        """Called with each phase that begins."""
        self.learning = phase == "learn"

    def __call__(self, plain: Callable[..., Outputs]) -> Callable[..., Outputs]:
        """The forward of a head with hidden states divided by the temperature."""

        def forward(hidden_NH: Tensor, projection: Module, targets_N: Tensor, needs: frozenset[Need]) -> Outputs:
            tempered_NH = hidden_NH / self.temperature if self.learning else hidden_NH
            return plain(tempered_NH, projection, targets_N, needs)

        return forward


def patches(model: Model, tempering: Tempering) -> list[ModulePatch]:
    """The record for the head of a policy or a reference.

    Raises:
        ConfigError: the head is more than a projection.
    """
    temperature = tempering.temperature
    if temperature == 1.0 or model.role not in ROLES:
        return []
    projection: Any = getattr(model.module, "get_output_embeddings", lambda: None)()
    head: Any = dict(model.module.named_modules()).get(HEAD)
    softcap = getattr(getattr(head, "rule", None), "softcap", None)
    if softcap is not None or getattr(projection, "bias", None) is not None:
        raise ConfigError(
            f"grpo.temperature is {temperature}, and the head of {model.name} has "
            f"{'a bias' if softcap is None else f'a soft cap of {softcap}'}",
            "Its probabilities at another temperature than 1 do not follow from scaled hidden states.",
            "Set grpo.temperature to 1.",
        )
    return [
        ModulePatch(
            slot="temperature",
            target=HEAD,
            replace=lambda head: tempering(head.forward),
            reason=f"log-probabilities at temperature {temperature}, which completions are sampled with",
        )
    ]
