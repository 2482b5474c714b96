"""Learning-rate schedules as items: those of transformers, torch's one-cycle, and a few shapes of our own.

A shape is a function of progress: 0 at the end of the warm-up, 1 at the end of the run; it returns a factor on the
peak. Every schedule saves plain numbers only.

| name | source |
|---|---|
| `linear`, `cosine`, `cosine_with_restarts`, `polynomial`, `inverse_sqrt`, `constant`, `constant_with_warmup`, `cosine_with_min_lr`, `cosine_warmup_with_min_lr`, `warmup_stable_decay` | transformers |
| `one_cycle` | Smith and Topin, arXiv:1708.07120, by torch |
| `rex` | Chen et al., arXiv:2107.04197, eq. 2 |
| `cosine_then_constant` | down a cosine to a floor, and then along it (Gupta et al., arXiv:2308.04014) |
| `constant_then_cosine` | at the peak, and then down a cosine |
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pegbox.record import Record
from pegbox.section import Section, setting
from pydantic import model_validator

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class NoOptions(Section):
    """A schedule without options."""


class CosineOptions(Section):
    """Options of `cosine`."""

    num_cycles: float = setting(0.5, "Waves of the cosine; 0.5 falls to zero once.", unit="1", gt=0)


class RestartOptions(Section):
    """Options of `cosine_with_restarts`."""

    num_cycles: int = setting(1, "How often it falls from the peak to zero.", ge=1)


class PolynomialOptions(Section):
    """Options of `polynomial`."""

    lr_end: float = setting(1e-7, "Learning rate at the end.", unit="1", ge=0)
    power: float = setting(1.0, "Power of the polynomial.", unit="1", gt=0)


class InverseSqrtOptions(Section):
    """Options of `inverse_sqrt`."""

    timescale: int | None = setting(None, "Steps until the rate has halved twice over; the warm-up unless set.", ge=1)


class MinOptions(Section):
    """Options of `cosine_with_min_lr`."""

    num_cycles: float = setting(0.5, "Waves of the cosine; 0.5 falls to the floor once.", unit="1", gt=0)
    min_lr: float | None = setting(None, "The floor.", unit="1", ge=0)
    min_lr_rate: float | None = setting(None, "The floor as a part of the peak.", unit="1", ge=0, le=1)

    @model_validator(mode="after")
    def _one_floor(self) -> MinOptions:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ValueError(
                f"min_lr is {self.min_lr} and min_lr_rate is {self.min_lr_rate}; the floor is one of them; set "
                "min_lr_rate to 0.1 and leave min_lr out"
            )
        return self


class WarmupMinOptions(MinOptions):
    """Options of `cosine_warmup_with_min_lr`."""

    warmup_lr_rate: float | None = setting(
        None, "Where the warm-up begins, as a part of the peak.", unit="1", ge=0, le=1
    )


class StableOptions(Section):
    """Options of `warmup_stable_decay`."""

    decay_steps: int | None = setting(None, "Length of the decay at the end.", unit="optimizer steps", ge=1)
    decay_ratio: float | None = setting(
        None, "The same as a part of the run's steps, rounded up; 0.1 unless decay_steps is set.", unit="1", gt=0, le=1
    )
    warmup_type: Literal["linear", "cosine", "1-sqrt"] = setting("linear", "Shape of the warm-up.")
    decay_type: Literal["linear", "cosine", "1-sqrt"] = setting(
        "cosine", "Shape of the decay; 1-sqrt is that of Hägele et al., arXiv:2405.18392."
    )
    min_lr_ratio: float = setting(0.0, "The floor as a part of the peak.", unit="1", ge=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> StableOptions:
        if self.decay_steps is not None and self.decay_ratio is not None:
            raise ValueError(
                f"decay_steps is {self.decay_steps} and decay_ratio is {self.decay_ratio}; "
                "both give the length of the decay; remove one of them"
            )
        return self


class OneCycleOptions(Section):
    """Options of `one_cycle`. Its rise is the warm-up."""

    rise: float = setting(0.3, "Part of the run in which the rate rises.", unit="1", gt=0, lt=1)
    start_divisor: float = setting(25.0, "The peak divided by the first rate.", unit="1", ge=1)
    end_divisor: float = setting(1e4, "The first rate divided by the last.", unit="1", ge=1)
    shape: Literal["cos", "linear"] = setting("cos", "Shape of both ways.")


class FloorOptions(Section):
    """Options of `rex`."""

    min_ratio: float = setting(0.0, "The floor as a part of the peak.", unit="1", ge=0, le=1)


class ConstantPartOptions(FloorOptions):
    """Options of `cosine_then_constant` and `constant_then_cosine`."""

    constant_ratio: float = setting(0.2, "Part of the steps after the warm-up that is constant.", unit="1", ge=0, lt=1)


class FromTransformers(Record):
    """A schedule of transformers."""

    name: str
    doc: str
    options: type[Section] = NoOptions
    endless: bool = False
    warms_up: bool = True

    def build(self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None, options: Section) -> LRScheduler:
        from transformers import get_scheduler

        given = {name: value for name, value in options.model_dump().items() if value is not None}
        if isinstance(options, StableOptions):
            part = 0.1 if options.decay_ratio is None else options.decay_ratio
            given.pop("decay_ratio", None)
            decay = given.pop("decay_steps", None) or math.ceil(part * (total_steps or 0))
            given["num_decay_steps"] = min(decay, (total_steps or 0) - warmup_steps)
        return get_scheduler(self.name, optimizer, warmup_steps, total_steps, given)


class OneCycle(Record):
    """One-cycle of torch; momentum is left alone."""

    doc: str = "Up to the peak and far down again, as one cycle."
    options: type[Section] = OneCycleOptions
    endless: bool = False
    warms_up: bool = False

    def build(
        self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None, options: OneCycleOptions
    ) -> LRScheduler:
        from torch.optim.lr_scheduler import OneCycleLR

        assert total_steps is not None, "a schedule that is not endless gets a length"
        return OneCycleLR(
            optimizer,
            max_lr=[float(group["lr"]) for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=options.rise,
            anneal_strategy=options.shape,
            cycle_momentum=False,
            div_factor=options.start_divisor,
            final_div_factor=options.end_divisor,
        )


class Shaped(Record):
    """A linear warm-up, then a shape over the rest of the run."""

    shape: Callable[[float, Any], float]
    doc: str
    options: type[Section] = FloorOptions
    endless: bool = False
    warms_up: bool = True

    def build(self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None, options: Section) -> LRScheduler:
        from torch.optim.lr_scheduler import LambdaLR

        assert total_steps is not None, "a schedule that is not endless gets a length"
        return LambdaLR(optimizer, partial(_factor, self.shape, options, warmup_steps, total_steps))


def _factor(shape: Callable[[float, Any], float], options: Section, warmup: int, total: int, step: int) -> float:
    if step < warmup:
        return step / warmup
    return shape(min((step - warmup) / max(total - warmup, 1), 1.0), options)


def rex(progress: float, options: FloorOptions) -> float:
    """(1 - z) / (1/2 + (1 - z) / 2), between the floor and the peak."""
    rest = 1.0 - progress
    return options.min_ratio + (1.0 - options.min_ratio) * rest / (0.5 + 0.5 * rest)


def cosine_then_constant(progress: float, options: ConstantPartOptions) -> float:
    """A cosine to the floor over the first part, then the floor."""
    return _cosine(progress / (1.0 - options.constant_ratio), options.min_ratio)


def constant_then_cosine(progress: float, options: ConstantPartOptions) -> float:
    """The peak over the first part, then a cosine to the floor."""
    return _cosine((progress - options.constant_ratio) / (1.0 - options.constant_ratio), options.min_ratio)


def _cosine(progress: float, floor: float) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


SCHEDULES: dict[str, FromTransformers | OneCycle | Shaped] = {
    "linear": FromTransformers(name="linear", doc="Down a line to zero."),
    "cosine": FromTransformers(name="cosine", options=CosineOptions, doc="Down a cosine to zero."),
    "cosine_with_restarts": FromTransformers(
        name="cosine_with_restarts", options=RestartOptions, doc="Down a cosine to zero, several times."
    ),
    "cosine_with_min_lr": FromTransformers(
        name="cosine_with_min_lr", options=MinOptions, doc="Down a cosine to a floor."
    ),
    "cosine_warmup_with_min_lr": FromTransformers(
        name="cosine_warmup_with_min_lr", options=WarmupMinOptions, doc="Up a cosine from a start, down to a floor."
    ),
    "polynomial": FromTransformers(name="polynomial", options=PolynomialOptions, doc="Down a polynomial."),
    "inverse_sqrt": FromTransformers(
        name="inverse_sqrt",
        options=InverseSqrtOptions,
        endless=True,
        doc="Down with the root of the step, without end.",
    ),
    "warmup_stable_decay": FromTransformers(
        name="warmup_stable_decay", options=StableOptions, doc="At the peak until the last part of the run."
    ),
    "constant": FromTransformers(name="constant", endless=True, warms_up=False, doc="Always the same."),
    "constant_with_warmup": FromTransformers(
        name="constant_with_warmup", endless=True, doc="At the peak after the warm-up."
    ),
    "one_cycle": OneCycle(),
    "rex": Shaped(shape=rex, doc="Down slowly first and fast at the end."),
    "cosine_then_constant": Shaped(
        shape=cosine_then_constant, options=ConstantPartOptions, doc="Down a cosine to a floor, then along it."
    ),
    "constant_then_cosine": Shaped(
        shape=constant_then_cosine, options=ConstantPartOptions, doc="At the peak, then down a cosine to a floor."
    ),
}
