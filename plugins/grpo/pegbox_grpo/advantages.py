"""From rewards to advantages, as pure functions of float64 tensors.

    R  completions, those of one prompt after another    K  named rewards, NaN where one does not apply

Every standard deviation is that of a sample (R - 1), and `SMALL` is added to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-4

Scale = Literal["group", "batch", "none"]


def weighted_sum(values_RK: Tensor, weights_K: Tensor) -> Tensor:
    """The reward of each completion: the weighted sum of those that apply."""
    return (values_RK * weights_K).nansum(1)


def spread(values: Tensor, dim: int) -> Tensor:
    """The standard deviation of what is not NaN; 0 of a single value, kept as a dimension."""
    known = ~values.isnan()
    mean = values.nanmean(dim, keepdim=True)
    squares = torch.where(known, values - mean, 0.0).square().sum(dim, keepdim=True)
    return (squares / (known.sum(dim, keepdim=True) - 1).clamp(min=1)).sqrt()


def group_advantages(rewards_R: Tensor, samples: int, scale: Scale) -> tuple[Tensor, Tensor]:
    """Rewards against the mean of their group (GRPO, arXiv:2402.03300, sec. 4.1.2).

        A_i = (r_i - mean of the group) / std        of the group; of the batch (arXiv:2508.08221); or not divided
                                                     (Dr. GRPO, arXiv:2503.20783)

    Returns:
        The advantages, and the standard deviation that belongs to each completion (of `none`: its group's).
    """
    groups_PS = rewards_R.view(-1, samples)
    advantages_R = (groups_PS - groups_PS.mean(1, keepdim=True)).flatten()
    std_R = spread(rewards_R, 0).expand_as(rewards_R)
    if scale != "batch":
        std_R = spread(groups_PS, 1).expand_as(groups_PS).flatten()
    return (advantages_R if scale == "none" else advantages_R / (std_R + SMALL)), std_R


def leave_one_out_advantages(rewards_R: Tensor, samples: int, scale: Scale) -> tuple[Tensor, Tensor]:
    """Rewards against the mean of the others in the group (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).

        A_i = r_i - mean over j != i of r_j        `batch`: then centred and divided over the batch

    Returns:
        The advantages, and the standard deviation of each completion's group.
    """
    groups_PS = rewards_R.view(-1, samples)
    std_R = spread(groups_PS, 1).expand_as(groups_PS).flatten()
    if samples == 1:
        return torch.zeros_like(rewards_R), std_R
    others_PS = (groups_PS.sum(1, keepdim=True) - groups_PS) / (samples - 1)
    advantages_R = (groups_PS - others_PS).flatten()
    if scale == "batch":
        advantages_R = (advantages_R - advantages_R.mean()) / (spread(advantages_R, 0) + SMALL)
    return advantages_R, std_R


def decoupled_advantages(values_RK: Tensor, weights_K: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Each reward normalised within its group, then summed and normalised over the batch (GDPO, arXiv:2601.05242).

    Returns:
        The advantages, and the standard deviation over the batch of the sums.
    """
    groups_PSK = values_RK.view(-1, samples, values_RK.shape[1])
    normal_PSK = (groups_PSK - groups_PSK.nanmean(1, keepdim=True)) / (spread(groups_PSK, 1) + SMALL)
    summed_R = weighted_sum(normal_PSK.view_as(values_RK), weights_K)
    std_R = spread(summed_R, 0).expand_as(summed_R)
    return (summed_R - summed_R.mean()) / (std_R + SMALL), std_R
