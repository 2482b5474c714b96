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
        "Layers that are computed again in the backward: `full` all of them, `none`, a number of layers, spread "
        "evenly, or `auto`: no more than memory asks for, measured in the first steps.",
    )
    modules: str | None = setting(
        None,
        r"Modules to compute again instead of layers: a regular expression that matches whole names, as in `.*\.mlp`.",
    )
    keep: Literal["inputs", "attention"] | None = setting(
        None,
        "What a module that is computed again keeps: its `inputs` only, or what its `attention` returned as well, "
        "which then is not computed again; null is `inputs`, and under `auto` attention as far as it fits.",
    )
    memory_gib: float | None = setting(
        None,
        "Under `auto`: the most that this process may use; null is what its GPU has. On a CPU it must be set, and "
        "counts the model, gradients, optimizer and what layers keep.",
        unit="GiB",
        gt=0,
    )
    margin: float = setting(
        0.08, "Under `auto`: the part of that memory that is left free, for what fragments.", unit="1", ge=0, lt=1
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
        if isinstance(self.policy, int) and self.policy < 1:
            raise ValueError(f"policy is {self.policy}; a number of layers is at least 1; for none of them write none")
        if self.modules is not None:
            self._whole_pattern(self.modules)
        if self.policy == "none" and self.offload == "none":
            raise ValueError("policy is none and offload is none; nothing would be done; remove the plugin")
        if self.policy == "none" and self.reentrant:
            raise ValueError("reentrant says how to recompute, but policy is none; remove reentrant")
        if self.keep is not None and self.policy == "none":
            raise ValueError("keep says what is not computed again, but policy is none: nothing is; remove keep")
        if self.keep == "attention" and self.reentrant:
            raise ValueError("keep is attention, which reentrant recomputing cannot do; remove one of them")
        return self

    @model_validator(mode="after")
    def _measured(self) -> ActivationsConfig:
        if self.policy != "auto":
            for name in ("memory_gib", "margin"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to policy auto, but policy is {self.policy}; remove {name}")
            return self
        if self.reentrant:
            raise ValueError("policy is auto and reentrant is on; what layers keep is then not seen; remove reentrant")
        if self.offload != "none":
            raise ValueError(
                f"policy is auto and offload is {self.offload}; what lies in host memory needs no choice by the "
                "device's; set policy to full, or remove offload"
            )
        return self

    def _whole_pattern(self, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"modules {pattern!r} is no regular expression: {error}; correct it") from error
        if isinstance(self.policy, int) or self.policy == "auto":
            raise ValueError(
                f"modules names what is recomputed, and policy {self.policy} counts layers; keep one of them"
            )
