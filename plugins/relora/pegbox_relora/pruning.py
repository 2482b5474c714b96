"""What becomes of the optimizer's states of an adapter that begins anew (arXiv:2307.05695, section 3).

The entries that become zero are chosen once for all states of a parameter, by the first of them (for Adam the average
gradient): where an average stayed and the average of squares became zero, the next step would be far too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pegbox.errors import RunError

from pegbox_relora.config import ReloraConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer


def prune(settings: ReloraConfig, optimizer: Optimizer, factors: Sequence[Parameter], seed: int) -> None:
    """Set a part of each state to zero, or drop the states, without waiting for the device.

    Raises:
        RunError: the optimizer's states are not plain numbers, one for each of the parameter's.
    """
    import torch

    if settings.prune == "reset":
        for factor in factors:
            optimizer.state.pop(factor, None)
        return
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in factors:
            states, count = list(_states(optimizer, factor)), int(settings.prune_ratio * factor.numel())
            if not states or not count:
                continue
            if settings.prune == "magnitude":
                sizes = states[0].abs().flatten()
                kept = sizes > sizes.kthvalue(count).values
            else:
                kept = torch.rand(factor.numel(), generator=source) >= settings.prune_ratio
            for state in states:
                state.mul_(kept.view_as(state).to(state.device))


def _states(optimizer: Optimizer, factor: Parameter) -> Iterator[Tensor]:
    """The states with one number for each of the parameter's, such as averages; not counters."""
    import torch

    states = [value for value in optimizer.state.get(factor, {}).values() if isinstance(value, torch.Tensor)]
    found = [value for value in states if value.shape == factor.shape and value.is_floating_point()]
    unlike = [value for value in states if value.numel() > 1 and not any(value is state for state in found)]
    if unlike:
        raise RunError(
            f"relora cannot prune the states of {type(optimizer).__name__}: one is {tuple(unlike[0].shape)} of "
            f"{unlike[0].dtype} for a parameter of {tuple(factor.shape)}",
            "Parts of a state can be set to zero only where it is one plain number for each of the parameter's.",
            "Set relora.prune to reset, or use an optimizer such as adamw.",
        )
    yield from found
