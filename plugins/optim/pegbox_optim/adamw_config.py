"""The section `adamw` of a config. Defaults follow transformers' Trainer, but for the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pegbox.config import validate
from pegbox.section import Section, setting
from pydantic import Field, model_validator

from pegbox_optim.schedules import SCHEDULES

if TYPE_CHECKING:
    from pegbox.context import Context

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
]
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamwConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = setting(
        2e-4,
        "Peak learning rate. The default suits adapters (QLoRA, table 9); all parameters want about a tenth.",
        unit="1",
        gt=0,
    )
    betas: tuple[Beta, Beta] = setting(
        (0.9, 0.999), "Decay rates of the averages of the gradient and of its square.", unit="1"
    )
    eps: float = setting(1e-8, "Added to the root of the second average before dividing by it.", unit="1", gt=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay, per step and times the learning rate.", unit="1", ge=0)
    decay_all: bool = setting(
        False, "Decay every parameter; otherwise biases, norm weights and other vectors are left out."
    )
    schedule: Schedule = setting("linear", "Shape of the learning rate over the run, as transformers names it.")
    schedule_options: dict[str, bool | int | float | str] = setting(
        {}, "Further options of the schedule, such as {num_cycles: 2} or {min_lr_rate: 0.1}."
    )
    warmup_steps: int | None = setting(
        None, "Steps over which the learning rate rises from 0 to its peak.", unit="optimizer steps", ge=0
    )
    warmup_ratio: float | None = setting(
        None, "The same as a part of the run's steps, rounded up.", unit="1", ge=0, le=1
    )
    fused: bool | None = setting(
        None, "Use torch's fused implementation; by default where every parameter's device has it."
    )

    def check(self, ctx: Context) -> None:
        """Raise what is wrong with the options of the schedule."""
        options = dict(self.schedule_options)
        validate(SCHEDULES[self.schedule].options, options, ctx.config.layer, ("adamw", "schedule_options"))

    @model_validator(mode="after")
    def _one_warmup(self) -> AdamwConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio is {self.warmup_ratio}; "
                "both give the length of the warmup; remove one of them"
            )
        if self.schedule == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                "schedule 'constant' has no warmup, but a warmup is set; "
                "it would do nothing; set schedule to constant_with_warmup"
            )
        return self
