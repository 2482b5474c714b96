"""The section `fsdp` of a config."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pegbox.section import Section, setting
from pydantic import Field, model_validator


class FsdpConfig(Section):
    """What is sharded, over which processes, and when weights are gathered."""

    layers: str | None = setting(
        None,
        "Modules whose weights are gathered together: a regular expression that matches whole names; unset: the "
        "decoder layers. What is in none of them is gathered for the whole forward and backward.",
    )
    reshard_after_forward: bool | Annotated[int, Field(ge=2)] = setting(
        True,
        "Free the gathered weights of a layer after its forward and gather them again for its backward; false keeps "
        "them, a number keeps them sharded over so many processes of a node.",
    )
    reduce_dtype: Literal["fp32", "bf16"] = setting("fp32", "Data type in which gradients are averaged over processes.")
    accumulate: Literal["whole", "shards"] = setting(
        "whole",
        "How gradients of several micro-batches are summed: whole ones on each process, averaged once a step, or "
        "shards, averaged with every micro-batch, which takes less memory and more communication.",
    )
    replicas: int = setting(
        1, "Copies of the sharded model; each is sharded over the processes divided by it.", unit="copies", ge=1
    )
    load: Literal["rank0", "every"] = setting(
        "rank0",
        "Who reads the weights: `rank0` sends them to the others layer by layer; with `every` each process holds all "
        "of them in host memory for a while.",
    )
    offload: bool = setting(
        False, "Keep shards, gradients and optimizer state in host memory; the optimizer then runs on the CPU."
    )

    @model_validator(mode="after")
    def _fits(self) -> FsdpConfig:
        if self.layers is not None:
            try:
                re.compile(self.layers)
            except re.error as error:
                raise ValueError(f"layers {self.layers!r} is no regular expression: {error}; correct it") from error
        return self
