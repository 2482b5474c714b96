"""The section `samples` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting
from pydantic import model_validator


class SamplesConfig(Section):
    """What is asked, and how answers are sampled."""

    prompts: tuple[str, ...] = setting(
        (), "Prompts: user messages where the tokenizer has a template, else plain text."
    )
    rows: int = setting(
        3,
        "Held-out rows, from the first on, whose beginning before the first trained token is a prompt.",
        unit="rows",
        ge=0,
    )
    max_new_tokens: int = setting(128, "Longest answer.", unit="tokens", ge=1)
    temperature: float = setting(0.0, "Randomness of the answers; 0 takes the likeliest token.", unit="1", ge=0)
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this probability.", unit="1", gt=0, le=1)
    show: bool = setting(True, "Print them too.")

    @model_validator(mode="after")
    def _fits(self) -> SamplesConfig:
        if not self.prompts and not self.rows:
            raise ValueError("prompts is empty and rows is 0; nothing would be generated; remove the plugin")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"top_p is {self.top_p}, but temperature 0 takes the likeliest token; it would do nothing; remove top_p"
            )
        return self
