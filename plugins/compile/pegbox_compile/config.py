"""The section `compile` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

Role = Literal["policy", "reference", "reward", "teacher", "features"]


class CompileConfig(Section):
    """What is compiled, and how."""

    scope: Literal["layers", "model"] = setting(
        "layers",
        "Compile each layer by itself, which takes the time of one, or the network around the layers as one graph.",
    )
    roles: tuple[Role, ...] = setting(("policy",), "Models to compile, by their role.", min_length=1)
    backend: str = setting("inductor", "torch's backend: inductor generates kernels; eager and aot_eager find faults.")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = setting(
        None, "A set of options that inductor knows by name."
    )
    dynamic: bool | None = setting(
        None, "Compile for any shape at once; unset, a second shape makes torch generalise; false compiles each anew."
    )
    fullgraph: bool = setting(False, "Raise where the graph would break, instead of running that part as it is.")
    options: dict[str, bool | int | float | str] = setting({}, "Options of inductor, such as {max_autotune: true}.")

    @model_validator(mode="after")
    def _fits(self) -> CompileConfig:
        if self.mode is not None and self.options:
            raise ValueError(f"mode is {self.mode} and options has entries; torch takes one of them; remove mode")
        if self.backend != "inductor" and (self.options or self.mode):
            raise ValueError(
                f"backend is {self.backend}, but mode and options are inductor's; "
                "remove them, or set backend to inductor"
            )
        return self
