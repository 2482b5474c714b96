"""What the loss says of the gradients that it will send: it saves computing, and is right even where it is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pegbox.types import Loss


class Expected:
    """Filled when the run starts, read in every forward.

    Attributes:
        uniform: every log-probability gets the same gradient (`Loss.uniform`, as for a sum of them): that of a trained
            head can be made in the forward.
        entropy_gradient: the entropy is differentiated (`Loss.entropy_gradient`): nothing is made in the forward.
    """

    def __init__(self) -> None:
        self.uniform = False
        self.entropy_gradient = False

    def learn(self, loss: Loss) -> None:
        self.uniform = bool(getattr(loss, "uniform", False))
        self.entropy_gradient = "entropy" in loss.needs and bool(getattr(loss, "entropy_gradient", False))
