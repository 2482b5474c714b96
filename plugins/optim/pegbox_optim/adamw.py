"""AdamW over the trainable parameters of a model.

Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in torch's fused
implementation: one kernel for many parameters, and no host-device synchronization even with a gradient
scaler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pegbox_optim.groups import torch_groups
from pegbox_optim.schedules import SCHEDULES
from pegbox_optim.warmup import warmup_steps

if TYPE_CHECKING:
    from pegbox.types import Model, ParameterGroup
    from torch.nn import Parameter
    from torch.optim import AdamW, Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pegbox_optim.adamw_config import AdamwConfig

FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_adamw(config: AdamwConfig, model: Model, groups: Sequence[ParameterGroup]) -> AdamW:
    """AdamW with one parameter group for each learning rate and decay.

    Raises:
        UserError: nothing is trainable.
    """
    from torch.optim import AdamW

    split = torch_groups(config, model, groups)
    return AdamW(
        split,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=is_fused(config.fused, split),
    )


def build_schedule(config: AdamwConfig, optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps; None is a run with an open end.

    Raises:
        ConfigError: it does not fit the length of the run.
    """
    schedule = SCHEDULES[config.schedule]
    warmup = warmup_steps("adamw", config, total_steps, endless=schedule.endless)
    return schedule.build(optimizer, warmup, total_steps, schedule.options(**config.schedule_options))


def is_fused(wanted: bool | None, groups: Sequence[dict[str, Any]]) -> bool:
    """Whether torch's fused kernels are used: as wanted, else where every parameter's device has them."""
    if wanted is not None:
        return wanted
    return all(has_fused_kernel(parameter) for group in groups for _, parameter in group["params"])


def has_fused_kernel(parameter: Parameter) -> bool:
    """Whether torch's fused AdamW can update this parameter."""
    return parameter.device.type in FUSED_DEVICES and parameter.is_floating_point()
