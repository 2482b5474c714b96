"""A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656):

    reference = alpha * policy + (1 - alpha) * reference        every tau steps

Alpha below 1 is the paper's soft update, alpha of 1 its hard one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from pegbox.types import Model


class SyncedReference:
    """Moves a frozen copy towards the policy. Checkpoints hold its weights once it has moved.

    Raises:
        ConfigError: the two models have not the same parameters, or they are sharded.
    """

    def __init__(self, policy: Model, reference: Model, alpha: float) -> None:
        self._policy = dict(policy.module.named_parameters())
        self._reference = dict(reference.module.named_parameters())
        self._alpha = alpha
        self._moves = 0
        if {n: p.shape for n, p in self._policy.items()} != {n: p.shape for n, p in self._reference.items()}:
            raise ConfigError(
                f"reference.sync_every is set, and {reference.name} has not the parameters of {policy.name}",
                "Weights are mixed one by one.",
                "Remove reference.model or reference.sync_every.",
            )
        if any(hasattr(p, "device_mesh") for p in (*self._policy.values(), *self._reference.values())):
            raise ConfigError(
                "reference.sync_every is set, and the models are sharded over processes",
                "What is mixed into a part of the weights that is gathered for a forward is lost after it.",
                "Remove reference.sync_every, or the plugin that shards.",
            )

    @torch.no_grad()
    def move(self) -> None:
        """Mix the policy's parameters into the reference's."""
        for name, weight in self._reference.items():
            weight.mul_(1 - self._alpha).add_(self._policy[name].to(weight.dtype), alpha=self._alpha)
        self._moves += 1

    def state_dict(self) -> dict[str, object]:
        weights = {name: weight.detach().cpu() for name, weight in self._reference.items()} if self._moves else {}
        return {"moves": self._moves, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; one from before the first move leaves the copy as it was loaded."""
        self._moves = state_dict["moves"]
        for name, weight in state_dict["weights"].items():
            self._reference[name].copy_(weight)
