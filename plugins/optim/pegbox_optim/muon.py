"""Muon for the hidden matrices of a network and AdamW for everything else, as one optimizer.

Muon replaces the running gradient of a matrix by the nearest orthogonal one (Newton-Schulz iterations), so that an
update moves all directions alike (Jordan et al. 2024; Liu et al., arXiv:2502.16982). It is made for matrices between
hidden states: embeddings, the head, vectors and stacked experts stay with AdamW, as in both sources.

Both are torch's own. They share one list of parameter groups and one state, which this optimizer owns: schedules,
checkpoints and other plugins see an ordinary optimizer. A group's `algorithm` says which of the two steps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import UserError
from torch.optim import AdamW, Muon, Optimizer

from pegbox_optim.building import embedding_names

if TYPE_CHECKING:
    from pegbox.types import Model

    from pegbox_optim.optimizers import MuonOptions


class MuonWithAdamw(Optimizer):
    """One optimizer over groups that Muon steps and groups that AdamW steps."""

    def __init__(self, groups: Sequence[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        self._parts: dict[str, Optimizer] = {}
        for algorithm, kind, settings in (("muon", Muon, muon), ("adamw", AdamW, adamw)):
            own = [group for group in groups if group["algorithm"] == algorithm]
            if own:
                self._parts[algorithm] = kind([dict(group) for group in own], **settings)
        defaults = [(name, part.defaults) for name, part in self._parts.items()]
        super().__init__([{**dict(defaults)[group["algorithm"]], **group} for group in groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # Loading a state replaces the groups of this optimizer, so the parts are given them anew.
            part.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            part.state = self.state
            part.step()
        return loss


def build_muon(model: Model, groups: Sequence[dict[str, Any]], options: MuonOptions) -> MuonWithAdamw:
    """Split each group into hidden matrices and the rest.

    Raises:
        UserError: there is no hidden matrix to train.
    """
    apart, split = set(embedding_names(model)), []
    for group in groups:
        for algorithm, scale in (("muon", 1.0), ("adamw", options.adamw_scale)):
            own = [
                (name, parameter)
                for name, parameter in group["params"]
                if (parameter.ndim == 2 and name not in apart) == (algorithm == "muon")
            ]
            if own:
                split.append({**group, "params": own, "lr": group["lr"] * scale, "algorithm": algorithm})
    if not any(group["algorithm"] == "muon" for group in split):
        raise UserError(
            f"optim.name is 'muon', but {model.name} trains no hidden matrix",
            "Embeddings, the head, vectors and stacked experts are stepped by AdamW: Muon would do nothing.",
            "Set optim.name to adamw.",
        )
    muon = {
        "momentum": options.momentum,
        "nesterov": options.nesterov,
        "ns_steps": options.ns_steps,
        "adjust_lr_fn": options.adjust,
    }
    return MuonWithAdamw(split, muon, {"betas": options.betas, "eps": options.eps})
