"""The model as it was before the adapter: adapter layers switched off for a while, nothing copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from pegbox_lora.config import FRESH, LoraConfig

if TYPE_CHECKING:
    from torch.nn import Module


def switch_of(settings: LoraConfig, module: Module) -> Callable[[], AbstractContextManager[None]] | None:
    """What switches the adapter off; None where that would not give the model that was loaded.

    Some initialisations take their part out of the base, trained biases are the base's own, and an adapter that is
    continued was part of the model before this run.
    """
    if settings.adapter is not None or settings.bias != "none" or settings.init not in FRESH:
        return None
    return lambda: switched_off(module)


@contextmanager
def switched_off(module: Module) -> Iterator[None]:
    """Within it adapter layers pass through what they wrap; afterwards the same parameters are trained as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(enabled=False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        for parameter in trained:
            parameter.requires_grad_(True)
