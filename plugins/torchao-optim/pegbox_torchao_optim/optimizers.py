"""What each optimizer of torchao takes, and how it is made.

State is a tensor subclass with blocks of low-bit numbers; a step is one compiled kernel for each shape of parameter. It
works on sharded parameters too. The learning rate is a tensor, so that a changed one compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pegbox.errors import ConfigError
from pegbox.record import Record
from pegbox.section import Section, setting
from pydantic import Field

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]
FP8_CAPABILITY = (8, 9)


class AdamwOptions(Section):
    """Options of all of them."""

    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "Decay rates of both averages.", unit="1")
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)
    block_size: int | None = setting(
        None, "Numbers that share a scale; 256 for 8 bits and fp8, 128 for 4 bits unless set.", unit="numbers", ge=2
    )
    bf16_stochastic_round: bool = setting(False, "Round bf16 parameters at random, so that small steps are not lost.")


class TorchaoOptimizer(Record):
    """An optimizer of torchao, by the name of its class in `torchao.optim`."""

    class_name: str
    doc: str
    options: type[Section] = AdamwOptions
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: AdamwOptions) -> Optimizer:
        """Make it.

        Raises:
            ConfigError: fp8 state on a device that has no fp8.
        """
        import torch
        import torchao.optim

        device = groups[0]["params"][0][1].device
        if "Fp8" in self.class_name and not (
            device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
        ):
            raise ConfigError(
                f"optim.name keeps state in fp8, but parameters are on {device}",
                "fp8 needs a GPU of compute capability 8.9 or later.",
                "Set optim.name to adamw_torchao_8bit.",
            )
        given = {name: value for name, value in options.model_dump().items() if value is not None}
        optimizer: Optimizer = getattr(torchao.optim, self.class_name)(list(groups), **given)
        return optimizer


OPTIMIZERS = {
    "adamw_torchao_8bit": TorchaoOptimizer(class_name="AdamW8bit", doc="AdamW with 8-bit state."),
    "adamw_torchao_4bit": TorchaoOptimizer(class_name="AdamW4bit", doc="AdamW with 4-bit state."),
    "adamw_torchao_fp8": TorchaoOptimizer(class_name="AdamWFp8", doc="AdamW with fp8 state."),
}
