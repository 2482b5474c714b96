"""What each schedule-free optimizer takes, and how it is made. They warm up by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pegbox.record import Record
from pegbox.section import Section, setting
from pydantic import Field

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer

InnerBeta = Annotated[float, Field(gt=0, lt=1)]


class AverageOptions(Section):
    """Options of the average."""

    r: float = setting(0.0, "Power of the step number in the weights of the average.", unit="1", ge=0)
    weight_lr_power: float = setting(2.0, "Power of the learning rate in the weights of the average.", unit="1", ge=0)


class SgdOptions(AverageOptions):
    """Options of `schedule_free_sgd`; it wants a learning rate near 1."""

    momentum: float = setting(0.9, "How far gradients are taken from z towards the average.", unit="1", gt=0, lt=1)
    warmup_steps: int = setting(
        0, "Steps over which the learning rate rises to its value.", unit="optimizer steps", ge=0
    )


class RadamOptions(AverageOptions):
    """Options of `schedule_free_radam`, which needs no warm-up."""

    betas: tuple[InnerBeta, InnerBeta] = setting(
        (0.9, 0.999), "How far gradients are taken towards the average; decay of the squared gradient.", unit="1"
    )
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class AdamwOptions(RadamOptions):
    """Options of `schedule_free_adamw`."""

    warmup_steps: int = setting(
        0, "Steps over which the learning rate rises to its value.", unit="optimizer steps", ge=0
    )


class ScheduleFree(Record):
    """A schedule-free optimizer, by the name of its class in `schedulefree`."""

    class_name: str
    options: type[Section]
    doc: str
    schedules: tuple[str, ...] | None = ("constant",)

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: Section) -> Optimizer:
        import schedulefree

        optimizer: Optimizer = getattr(schedulefree, self.class_name)(list(groups), **options.model_dump())
        return optimizer


OPTIMIZERS = {
    "schedule_free_adamw": ScheduleFree(
        class_name="AdamWScheduleFree", options=AdamwOptions, doc="AdamW without a schedule."
    ),
    "schedule_free_radam": ScheduleFree(
        class_name="RAdamScheduleFree", options=RadamOptions, doc="RAdam without schedule and warm-up."
    ),
    "schedule_free_sgd": ScheduleFree(class_name="SGDScheduleFree", options=SgdOptions, doc="SGD without a schedule."),
}
