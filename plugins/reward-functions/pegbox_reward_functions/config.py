"""The section `reward-functions` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import JsonValue, field_validator


class RewardEntry(Section):
    """One reward, where its name alone does not say everything."""

    use: str = setting(
        ..., "A built-in, or a function: `module:function`, `module.function`, `./file.py:function`.", min_length=1
    )
    name: str | None = setting(
        None, "Name of the score, which `rewards` weighs; the function's own if not set.", min_length=1
    )
    options: dict[str, JsonValue] = setting({}, "Options of a built-in, by name.")


class RewardFunctionsConfig(Section):
    """Which functions score completions, and where they run."""

    functions: tuple[str | RewardEntry, ...] = setting(
        ..., "Rewards: names of built-ins, import paths of functions, or `{use, name, options}`."
    )
    workers: int = setting(
        1, "Processes that score; each has its main thread, so that functions may use signals.", unit="processes", ge=1
    )
    timeout_s: float = setting(
        60.0, "Longest call of one function with the completions of one prompt.", unit="seconds", gt=0
    )
    on_timeout: Literal["error", "none"] = setting(
        "error", "A call that takes longer stops the run, or its scores count as not applicable; it is killed anyway."
    )

    @field_validator("functions")
    @classmethod
    def _names_functions(cls, functions: tuple[str | RewardEntry, ...]) -> tuple[str | RewardEntry, ...]:
        if not functions:
            raise ValueError("functions is empty; nothing would be scored; name one, or remove the plugin")
        return functions

    def entries(self) -> list[RewardEntry]:
        """The functions, each in its long form."""
        return [RewardEntry(use=one) if isinstance(one, str) else one for one in self.functions]
