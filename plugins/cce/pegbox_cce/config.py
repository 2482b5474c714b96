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
    overlap: bool | None = setting(
        None, "In ours: run softmax beside matrix products; null is where there is enough to do, and never on a CPU."
    )

    @model_validator(mode="after")
    def _fits(self) -> CceConfig:
        for name in ("logits_gib", "overlap"):
            if self.implementation != "pegbox" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for implementation pegbox, not {self.implementation}; remove {name}")
        return self
