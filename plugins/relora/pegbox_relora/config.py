"""The section `relora` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator


class ReloraConfig(Section):
    """When the adapter is merged and begun anew, and what becomes of optimizer states and learning rate then."""

    every: int = setting(
        ..., "How often the adapter is merged and begun anew; the paper: 5000.", unit="optimizer steps", ge=2
    )
    warmup_steps: int = setting(
        50,
        "Steps over which the learning rate rises back to the schedule after each restart; the paper: 50 to 100.",
        unit="optimizer steps",
        ge=0,
    )
    anneal_steps: int = setting(
        0, "Steps before each restart over which the learning rate falls to zero.", unit="optimizer steps", ge=0
    )
    prune: Literal["magnitude", "random", "reset"] = setting(
        "magnitude",
        "What becomes of the optimizer's states of the adapter: the smallest entries become zero, random ones do, or "
        "the states begin anew.",
    )
    prune_ratio: float = setting(0.99, "Part of each state that becomes zero; the paper: 0.99.", unit="1", gt=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> ReloraConfig:
        if self.warmup_steps + self.anneal_steps >= self.every:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and anneal_steps {self.anneal_steps} leave no step of {self.every} "
                "at the schedule's learning rate; lower them, or raise every"
            )
        if self.prune == "reset" and "prune_ratio" in self.model_fields_set and self.prune_ratio != 0.99:
            raise ValueError("prune is reset, which leaves nothing, so prune_ratio would do nothing; remove it")
        return self
