"""The section `cce` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

Implementation = Literal["pegbox", "apple", "liger"]


class CceConfig(Section):
    """Which kernel computes the head, and with how much memory."""

    implementation: Implementation = setting(
        "pegbox",
        "Whose kernel: ours (log-probabilities and entropy, every head), `apple` (cut-cross-entropy: least memory, "
        "leaves small gradients out) or `liger` (liger-kernel); the last two need a GPU and give no entropy.",
    )
    logits_gib: float | None = setting(
        None,
        "Most memory for logits, in ours; null is 0.86 with a frozen head and 1.6 with a trained one. Less is slower.",
        unit="GiB",
        gt=0,
    )

    @model_validator(mode="after")
    def _fits(self) -> CceConfig:
        if self.implementation != "pegbox" and self.logits_gib is not None:
            raise ValueError(f"logits_gib is for implementation pegbox, not {self.implementation}; remove logits_gib")
        return self
