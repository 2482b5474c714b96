"""The canary: weights that are visibly other than those trained, for a moment, put back bit for bit.

A server that swallows updates cannot be told from one that takes them while the weights hardly change, which is how
every run begins (a new adapter changes nothing at all). So the first sync sends weights with noise on every trained
parameter, strong enough that the trainer's own log-probabilities of the probes move by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError

from pegbox_rollout_vllm.probes import Probes, difference, trainer_logps

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch import Tensor

VISIBLE = 10.0
"""The probes must move by so many times the tolerance."""
SHARE = 0.2
"""A server that kept its weights is off by all of what the probes moved, one that took them by a small share."""
FIRST, TRIES = 0.01, 12
"""Noise begins at this share of a parameter's size and is doubled until it is seen."""


@contextmanager
def disturbed(ctx: Context, model: Model, probes: Probes, tolerance: float) -> Iterator[tuple[list[float], float]]:
    """Within it every trained parameter carries noise.

    Gives the trainer's log-probabilities of the probes then, and the mean difference from them that a server which took
    the noise may show: rounding grows with the noise.

    Every rank enters it. The originals are kept on the host meanwhile.

    Raises:
        RunError: no noise could be seen, or the probes became not finite.
    """
    trained = [_local(parameter) for parameter in model.module.parameters() if parameter.requires_grad]
    originals = [parameter.to("cpu", copy=True) for parameter in trained]
    before = trainer_logps(ctx, model, probes)
    try:
        for doubling in range(TRIES):
            _disturb(ctx, trained, originals, FIRST * 2**doubling)
            after = trainer_logps(ctx, model, probes)
            moved = difference(before, after)
            if moved >= VISIBLE * tolerance:
                break
        else:
            raise RunError(
                f"noise on the trained parameters moved the probes' log-probabilities by {moved:.2g} nats only",
                f"To see whether the server takes weights it must be {VISIBLE * tolerance:.2g}.",
                "Set a smaller rollout-vllm.tolerance, or rollout-vllm.canary to false.",
            )
        yield after, max(tolerance, SHARE * moved)
    finally:
        for part, original in zip(trained, originals, strict=True):
            part.copy_(original)


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter; changing it changes the parameter."""
    plain = parameter.detach()
    return plain.to_local() if hasattr(plain, "to_local") else plain


def _disturb(ctx: Context, trained: list[Tensor], originals: list[Tensor], strength: float) -> None:
    """Original plus noise of `strength` times its root mean square; parameters that are zero count as 0.1.

    The noise is one of the seed, so copies of a parameter on several ranks stay equal.
    """
    with torch.random.fork_rng(devices={part.device for part in trained if part.device.type == "cuda"}):
        torch.manual_seed(ctx.rng("rollout-vllm/canary").seed)
        for part, original in zip(trained, originals, strict=True):
            size = float(original.float().square().mean().sqrt()) if original.numel() else 0.0
            part.copy_(original)
            part.add_(torch.randn_like(part), alpha=strength * (size or 0.1))
