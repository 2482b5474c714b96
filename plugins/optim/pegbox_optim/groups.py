"""From the engine's parameter groups to torch's: learning rates, and what is decayed.

What is decayed follows transformers' Trainer: biases and norm weights are not. So are no other vectors and
scalars (attention sinks, DoRA magnitudes): decaying them shrinks scales, not weights of a linear map.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pegbox.errors import ConfigError, PluginError, UserError

if TYPE_CHECKING:
    from pegbox.types import GroupOptions, Model, ParameterGroup
    from torch.nn import Parameter

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names that transformers' `Trainer.get_decay_parameter_names` leaves out."""


class Rates(Protocol):
    """What parameters get that no group speaks of."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def decay_all(self) -> bool: ...


def torch_groups(rates: Rates, model: Model, groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """One torch group for each learning rate and decay: `params` are (name, parameter) pairs.

    Raises:
        UserError: nothing is trainable.
    """
    parameters = dict(model.module.named_parameters())
    if not any(group.names for group in groups):
        raise UserError(
            f"{model.name} has no trainable parameter: all {len(parameters)} are frozen",
            "An optimizer needs something to train.",
            "Add an adapter plugin such as lora to plugins, or let the model's parameters require gradients.",
        )
    return [split for group in groups for split in _by_decay(rates, group, parameters)]


def refuse_sharded(name: str, groups: Sequence[dict[str, Any]]) -> None:
    """Raise if parameters are sharded over processes.

    Raises:
        ConfigError: they are, and this optimizer would fail on them, or step each part as if it were the whole.
    """
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
        raise ConfigError(
            f"optim.name is '{name}', but parameters are sharded over processes",
            "It needs whole matrices: norms, rows and columns of a part are not those of the whole.",
            "Set optim.name to adamw, or place the model unsharded.",
        )


def is_decayed(name: str, parameter: Parameter) -> bool:
    """Whether weight decay applies to a parameter by default."""
    return parameter.ndim >= 2 and UNDECAYED.search(name) is None


def _by_decay(rates: Rates, group: ParameterGroup, parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    rate = _learning_rate(rates, group.options)
    by_decay: dict[float, list[tuple[str, Parameter]]] = {}
    for name in group.names:
        decay = group.options.weight_decay
        if decay is None:
            decays = rates.decay_all or is_decayed(name, parameters[name])
            decay = rates.weight_decay if decays else 0.0
        by_decay.setdefault(decay, []).append((name, parameters[name]))
    for decay, named in by_decay.items():
        yield {"params": named, "lr": rate, "weight_decay": decay}


def _learning_rate(rates: Rates, options: GroupOptions) -> float:
    if options.learning_rate is not None and options.learning_rate_scale is not None:
        raise PluginError(
            f"parameters get learning_rate {options.learning_rate} and "
            f"learning_rate_scale {options.learning_rate_scale}",
            "The first is absolute and the second a factor on the optimizer's own: only one can hold.",
            "Change the setting in one of the plugins that give options to these parameters.",
        )
    if options.learning_rate is not None:
        return options.learning_rate
    return rates.learning_rate * (1.0 if options.learning_rate_scale is None else options.learning_rate_scale)
