"""AdamW over the trainable parameters of a model.

Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in torch's fused
implementation: one kernel for many parameters, and no host-device synchronization even with a gradient
scaler.

What is decayed follows transformers' Trainer: biases and norm weights are not. So are no other vectors and
scalars (attention sinks, DoRA magnitudes): decaying them shrinks scales, not weights of a linear map.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pegbox.errors import PluginError, UserError

if TYPE_CHECKING:
    from pegbox.types import GroupOptions, Model, ParameterGroup
    from torch.nn import Parameter
    from torch.optim import AdamW

    from pegbox_adamw.config import AdamwConfig

FUSED_DEVICES = frozenset({"cpu", "cuda"})
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names that transformers' `Trainer.get_decay_parameter_names` leaves out."""


def build_adamw(config: AdamwConfig, model: Model, groups: Sequence[ParameterGroup]) -> AdamW:
    """AdamW with one parameter group for each learning rate and decay.

    Raises:
        UserError: nothing is trainable.
    """
    from torch.optim import AdamW

    parameters = dict(model.module.named_parameters())
    names = [name for group in groups for name in group.names]
    if not names:
        raise UserError(
            f"{model.name} has no trainable parameter: all {len(parameters)} are frozen",
            "An optimizer needs something to train.",
            "Add an adapter plugin such as lora to plugins, or let the model's parameters require gradients.",
        )
    fused = config.fused
    if fused is None:
        fused = all(has_fused_kernel(parameters[name]) for name in names)
    return AdamW(
        [split for group in groups for split in _torch_groups(config, group, parameters)],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def is_decayed(name: str, parameter: Parameter) -> bool:
    """Whether weight decay applies to a parameter by default."""
    return parameter.ndim >= 2 and UNDECAYED.search(name) is None


def has_fused_kernel(parameter: Parameter) -> bool:
    """Whether torch's fused AdamW can update this parameter."""
    return parameter.device.type in FUSED_DEVICES and parameter.is_floating_point()


def _torch_groups(
    config: AdamwConfig, group: ParameterGroup, parameters: Mapping[str, Parameter]
) -> Iterator[dict[str, Any]]:
    rate = _learning_rate(config, group.options)
    by_decay: dict[float, list[tuple[str, Parameter]]] = {}
    for name in group.names:
        decay = group.options.weight_decay
        if decay is None:
            decays = config.decay_all or is_decayed(name, parameters[name])
            decay = config.weight_decay if decays else 0.0
        by_decay.setdefault(decay, []).append((name, parameters[name]))
    for decay, named in by_decay.items():
        yield {"params": named, "lr": rate, "weight_decay": decay}


def _learning_rate(config: AdamwConfig, options: GroupOptions) -> float:
    if options.learning_rate is not None and options.learning_rate_scale is not None:
        raise PluginError(
            f"parameters get learning_rate {options.learning_rate} and "
            f"learning_rate_scale {options.learning_rate_scale}",
            "The first is absolute and the second a factor on the optimizer's own: only one can hold.",
            "Change the setting in one of the plugins that give options to these parameters.",
        )
    if options.learning_rate is not None:
        return options.learning_rate
    return config.learning_rate * (1.0 if options.learning_rate_scale is None else options.learning_rate_scale)
