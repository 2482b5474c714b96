"""The section `activations` of a config."""

from __future__ import annotations

import re
from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator


class ActivationsConfig(Section):
    """Which modules are computed again in the backward, and where what is kept lies."""

    policy: Literal["full", "none", "auto"] | int = setting(
        "full",
        "Layers that are computed again in the backward: `full` all of them, `none`, or a number of layers, "
        "spread evenly.",
    )
    modules: str | None = setting(
        None,
        r"Modules to compute again instead of layers: a regular expression that matches whole names, as in `.*\.mlp`.",
    )
    reentrant: bool = setting(
        False,
        "Use torch's older way of recomputing, which needs inputs with gradients; only where something asks for it.",
    )
    preserve_rng: bool = setting(
        True,
        "Draw the same random numbers again, so that dropout is the same; off saves a little time without dropout.",
    )
    offload: Literal["none", "cpu"] = setting(
        "none", "Where what these modules keep lies between forward and backward; `cpu` is host memory."
    )
    offload_min_bytes: int = setting(1 << 20, "Smaller tensors stay where they are.", unit="bytes", ge=0)

    @model_validator(mode="after")
    def _fits(self) -> ActivationsConfig:
        if self.policy == "auto":
            raise ValueError(
                "policy 'auto' (choosing layers by the memory that is free) does not exist yet; "
                "set full, none, or a number of layers"
            )
        if isinstance(self.policy, int) and self.policy < 1:
            raise ValueError(f"policy is {self.policy}; a number of layers is at least 1; for none of them write none")
        if self.modules is not None:
            self._whole_pattern(self.modules)
        if self.policy == "none" and self.offload == "none":
            raise ValueError("policy is none and offload is none; nothing would be done; remove the plugin")
        if self.policy == "none" and self.reentrant:
            raise ValueError("reentrant says how to recompute, but policy is none; remove reentrant")
        return self

    def _whole_pattern(self, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"modules {pattern!r} is no regular expression: {error}; correct it") from error
        if isinstance(self.policy, int):
            raise ValueError(
                f"modules names what is recomputed, and policy {self.policy} counts layers; keep one of them"
            )
