"""Log-probabilities by a forward of a model that is not trained by it.

The same forward as the loop's, on the same batch: the same precision, kernels and padding, so that a policy that has
not moved has log-ratios of zero. In evaluation mode and without gradients; afterwards each part is in the mode it was
in. No dropout is drawn, so no random state moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from pegbox.types import Model, Need, Runtime
    from torch import Tensor, nn

NEEDS: frozenset[Need] = frozenset({"logps"})


class Computed:
    """Log-probabilities of trained tokens: one float32 tensor of N for each batch, on the device.

    Args:
        model: placed.
        runtime: where it is.
        switch: a context in which the model's adapter is switched off.
    """

    def __init__(
        self, model: Model, runtime: Runtime, switch: Callable[[], AbstractContextManager[None]] | None = None
    ) -> None:
        assert model.forward is not None, "a model computes after it was placed"
        self.model = model
        self._forward, self._runtime, self._within = model.forward, runtime, switch or nullcontext
        self.switches = switch is not None

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        with torch.no_grad(), evaluating(self.model.module), self._within():
            return [self._logps(batch) for batch in batches]

    def _logps(self, batch: Batch) -> Tensor:
        logps_N = self._forward(batch.to(self._runtime.device), NEEDS).logps_N
        assert logps_N is not None, "it was asked for"
        return logps_N.detach().float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each part of the module is in the mode it was in."""
    trained = [part for part in module.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        yield
    finally:
        for part in trained:
            part.training = True
