"""The two sets of weights of a schedule-free optimizer, and which of them the model holds.

Gradients are taken at y, and what is evaluated and kept is the average x (Defazio et al., arXiv:2405.15682, eq. 1-3).
The optimizer holds z, from which and from one of the two the other follows; its `train()` and `eval()` move the model's
parameters between them. Here the mode of the module decides, at the first forward after it changed: the loop puts the
module into evaluation mode to evaluate. A checkpoint keeps whichever is in place, with the optimizer's mark of which.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from pegbox.types import Model, Need, Outputs
    from torch.optim import Optimizer


class WeightSwitch:
    """Puts y in place for a training forward, and x for any other.

    Attributes:
        model: the model whose forward does so.
    """

    def __init__(self, model: Model) -> None:
        assert model.forward is not None, "the owner of place_model gives a forward"
        self._module, self._forward = model.module, model.forward
        self._optimizer: Any = None
        self.model = replace(model, forward=self._switched)

    def follow(self, optimizer: Optimizer) -> None:
        """Switch the weights of this optimizer.

        Raises:
            ConfigError: it is not schedule-free.
        """
        if not all("train_mode" in group for group in optimizer.param_groups):
            raise ConfigError(
                f"plugins lists schedule-free, but the optimizer is {type(optimizer).__name__}",
                "The plugin would do nothing.",
                "Set optim.name to schedule_free_adamw, or remove schedule-free from plugins.",
            )
        self._optimizer = optimizer

    def to_average(self) -> None:
        """Put x in place."""
        if self._optimizer is not None:
            self._optimizer.eval()

    def _switched(self, batch: Batch, needs: frozenset[Need]) -> Outputs:
        if self._optimizer is not None:
            self._optimizer.train() if self._module.training else self._optimizer.eval()
        return self._forward(batch, needs)
