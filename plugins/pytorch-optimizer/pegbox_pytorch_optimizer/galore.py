"""GaLore with a state that a checkpoint can hold.

The library keeps each matrix's projection in an object of its own. Here that object becomes a tensor and the step at
which it was made when the state is read, and is made again from them when one is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_optimizer import GaLore
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

PROJECTION, MADE_AT = "projection", "projection_made_at"
SETTINGS = ("rank", "update_proj_gap", "scale", "projection_type")


class PlainGaLore(GaLore):
    """The library's GaLore; only how its state is written and read differs."""

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, of plain values and tensors; a projection of both sides is a tuple of two."""
        state: dict[str, Any] = super().state_dict()
        return {**state, "state": {number: _plain(values) for number, values in state["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state that `state_dict` gave."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                values = self.state.get(parameter, {})
                if PROJECTION in values:
                    projector = GaLoreProjector(**{name: group[name] for name in SETTINGS})
                    projector.ortho_matrix, projector.last_svd_step = values.pop(PROJECTION), values.pop(MADE_AT)
                    values["projector"] = projector


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    projector = values.get("projector")
    if projector is None:
        return dict(values)
    plain = {name: value for name, value in values.items() if name != "projector"}
    return {**plain, PROJECTION: projector.ortho_matrix, MADE_AT: projector.last_svd_step}
