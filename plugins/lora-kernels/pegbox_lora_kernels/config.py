"""The section `lora-kernels` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator


class LoraKernelsConfig(Section):
    """Which adapted layers the kernels compute; what is switched off stays with PEFT."""

    qkv: bool = setting(True, "The projections of an attention's queries, keys and values, as one group.")
    o: bool = setting(True, "The projection of an attention's output.")
    mlp: bool = setting(
        True, "Gated MLPs as a whole: gate, up, their activation, and down; layers of other MLPs by themselves."
    )
    other: bool = setting(True, "Every other adapted linear layer, by itself.")
    mlp_keeps: Literal["projections", "input"] = setting(
        "projections",
        "What an MLP keeps for its backward: the products of gate and up, or its input alone, to make them again.",
    )

    @model_validator(mode="after")
    def _fits(self) -> LoraKernelsConfig:
        if not (self.qkv or self.o or self.mlp or self.other):
            raise ValueError("every part is off: nothing would be done; remove lora-kernels from plugins")
        if not self.mlp and self.mlp_keeps != "projections":
            raise ValueError(f"mlp_keeps is {self.mlp_keeps}, but mlp is off: it would do nothing; remove mlp_keeps")
        return self
