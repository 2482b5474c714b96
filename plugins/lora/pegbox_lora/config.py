"""The section `lora` of a config."""

from __future__ import annotations

import re
from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

ALL_LINEAR = "all-linear"


class LoraConfig(Section):
    """What is adapted, and how. Rank 16 with alpha 32 on all linear layers: Biderman et al. 2024, arXiv:2405.09673."""

    r: int = setting(16, "Rank of the update of each weight.", ge=1)
    alpha: float = setting(32.0, "Scale of the update: it is multiplied by alpha / r (rsLoRA: alpha / sqrt(r)).", gt=0)
    dropout: float = setting(0.0, "Probability that an input of the adapter is dropped.", unit="1", ge=0, lt=1)
    targets: str | tuple[str, ...] = setting(
        ALL_LINEAR,
        "Modules to adapt: `all-linear` (all but the head), a list of names or ends of names, or a regular expression "
        "that matches whole names.",
    )
    exclude: tuple[str, ...] = setting((), "Names, or ends of names, of modules that are not adapted after all.")
    layers: tuple[int, ...] = setting((), "Numbers of the layers to adapt, counted from 0; none means all of them.")
    parameters: tuple[str, ...] = setting(
        (), "Ends of names of stacked expert weights to adapt, such as `experts.gate_up_proj`; they are no modules."
    )
    modules_to_save: tuple[str, ...] = setting((), "Modules that are trained in full and kept with the adapter.")
    bias: Literal["none", "all", "lora_only"] = setting(
        "none", "Which biases of the base are trained: none, all, or those of adapted modules."
    )
    init: Literal["default", "gaussian", "orthogonal"] = setting(
        "default", "How the first matrix begins: `default` is Kaiming-uniform; the second one is zero."
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).")
    use_dora: bool = setting(
        False, "Train the length of each weight's columns apart from their direction (DoRA, arXiv:2402.09353)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Data type of the adapter's parameters.")

    @model_validator(mode="after")
    def _fits(self) -> LoraConfig:
        if not self.targets and not self.parameters:
            raise ValueError("targets is empty and so is parameters: nothing would be adapted; set targets: all-linear")
        self._pattern()
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR and self.layers:
            raise ValueError(
                "layers cannot be combined with a regular expression; write the layers into the expression"
            )
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers holds {min(self.layers)}; layers are counted from 0")
        if self.parameters and (self.dropout or self.use_dora or self.init == "orthogonal"):
            raise ValueError(
                "parameters (stacked experts) take no dropout, no DoRA and no orthogonal init; switch these off"
            )
        if self.init == "orthogonal" and self.r % 2:
            raise ValueError(f"init: orthogonal needs an even rank, but r is {self.r}; set r to {self.r + 1}")
        twice = set(self.modules_to_save) & set(self.targets if isinstance(self.targets, tuple) else ())
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} is in targets and in modules_to_save; remove it from one of them"
            )
        return self

    def _pattern(self) -> None:
        if isinstance(self.targets, tuple):
            return
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets {self.targets!r} is no regular expression: {error}; list names instead"
            ) from error
