"""The section `optim` of a config: which optimizer and schedule, and what all of them understand."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pegbox.section import Section, setting
from pydantic import model_validator

if TYPE_CHECKING:
    from pegbox.context import Context

Value = bool | int | float | str | tuple[bool | int | float | str, ...] | None


class GroupSetting(Section):
    """What parameters with a matching name get."""

    pattern: str = setting(
        ..., "Regular expression, searched in parameter names; one that matches nothing is an error."
    )
    learning_rate: float | None = setting(None, "Their peak learning rate.", unit="1", ge=0)
    scale: float | None = setting(None, "Or a factor on optim.learning_rate.", unit="1", ge=0)
    weight_decay: float | None = setting(None, "Their weight decay, biases and norms included.", unit="1", ge=0)

    @model_validator(mode="after")
    def _says_something(self) -> GroupSetting:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}; correct it") from error
        if self.learning_rate is not None and self.scale is not None:
            raise ValueError(
                f"learning_rate is {self.learning_rate} and scale is {self.scale}; "
                "the first is absolute, the second a factor; remove one of them"
            )
        if self.learning_rate is self.scale is self.weight_decay is None:
            raise ValueError(
                f"the group {self.pattern!r} sets nothing; give it a learning_rate, a scale or a weight_decay"
            )
        return self


class OptimConfig(Section):
    """An optimizer and a learning-rate schedule by name."""

    name: str = setting("adamw", "The optimizer: an item of kind `optimizer` of an active plugin.")
    options: dict[str, Value] = setting({}, "Further options of that optimizer; unknown ones are an error.")
    learning_rate: float = setting(
        2e-4, "Peak learning rate. The default suits adapters and AdamW; other optimizers want others.", unit="1", gt=0
    )
    weight_decay: float = setting(0.0, "Weight decay, as the optimizer applies it.", unit="1", ge=0)
    decay_all: bool = setting(
        False, "Decay every parameter; otherwise biases, norm weights and other vectors are left out."
    )
    groups: tuple[GroupSetting, ...] = setting((), "Learning rates and decay of parameters by name.")
    embedding_learning_rate: float | None = setting(
        None, "Peak learning rate of the embeddings and of the head, where they are trained.", unit="1", gt=0
    )
    embedding_scale: float | None = setting(None, "The same as a factor on learning_rate.", unit="1", gt=0)
    schedule: str = setting("linear", "The schedule: an item of kind `schedule` of an active plugin.")
    schedule_options: dict[str, Value] = setting({}, "Further options of that schedule; unknown ones are an error.")
    warmup_steps: int | None = setting(
        None, "Steps over which the learning rate rises from 0 to its peak.", unit="optimizer steps", ge=0
    )
    warmup_ratio: float | None = setting(
        None, "The same as a part of the run's steps, rounded up.", unit="1", ge=0, le=1
    )

    def check(self, ctx: Context) -> None:
        """Raise what is wrong with names and options."""
        from pegbox_optim.items import check

        check(ctx)

    @model_validator(mode="after")
    def _one_of_two(self) -> OptimConfig:
        for one, other in (("warmup_steps", "warmup_ratio"), ("embedding_learning_rate", "embedding_scale")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{one} is {getattr(self, one)} and {other} is {getattr(self, other)}; "
                    "both say the same thing in different units; remove one of them"
                )
        return self
