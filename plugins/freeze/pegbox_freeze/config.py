"""The section `freeze` of a config."""

from __future__ import annotations

import re
from typing import Annotated

from pegbox.section import Section, setting
from pydantic import Field, model_validator

Token = Annotated[int, Field(ge=0)] | str


class FreezeConfig(Section):
    """Which parameters are trained; the others stay as they are. Expressions are searched for in parameter names."""

    train: tuple[str, ...] = setting(
        (),
        "Regular expressions: only parameters whose name holds one of them are trained. If not set: all but those of "
        "`freeze`, and with `rows` alone none.",
    )
    freeze: tuple[str, ...] = setting(
        (), "Regular expressions: of these parameters, those whose name holds one of them are not trained after all."
    )
    rows: dict[str, tuple[Token, ...]] = setting(
        {},
        "Rows of embeddings to train, {expression: [token, ...]} by text or id; all other rows of these parameters "
        "stay, and the parameters are trained whatever `train` says.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> FreezeConfig:
        if not (self.train or self.freeze or self.rows):
            raise ValueError("nothing is set, so nothing would be frozen; set train, freeze or rows")
        for key in ("train", "freeze", "rows"):
            for expression in getattr(self, key):
                try:
                    re.compile(expression)
                except re.error as error:
                    raise ValueError(f"{key} {expression!r} is no regular expression: {error}; escape it") from error
        for expression, tokens in self.rows.items():
            if not tokens:
                raise ValueError(f"rows {expression!r} lists no token; list some, or freeze the parameter")
            if len(set(tokens)) != len(tokens):
                raise ValueError(f"rows {expression!r} names a token twice; remove one of them")
        return self
