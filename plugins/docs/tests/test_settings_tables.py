"""What a table of settings says is what pydantic enforces."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pegbox.section import Section, setting
from pegbox_docs.settings import tables
from pydantic import Field


class Row(Section):
    """One row."""

    path: str = setting(..., "Where it lies.", min_length=1)


class Everything(Section):
    """All kinds of settings."""

    rate: float = setting(2e-4, "How fast.", unit="1", gt=0, le=1)
    steps: int | None = setting(None, "How long.", unit="steps", ge=1)
    mode: Literal["drop", "keep"] = setting("drop", "What to do with a | b.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], float] = setting((0.9, 0.5), "Two of them.")
    names: tuple[str, ...] = setting((), "Any names.")
    weights: dict[str, float] = setting({}, "Weights by name.")
    rows: tuple[Row, ...] = setting((), "The rows.")
    on: bool = setting(False, "A switch.")
    name: str = setting(..., "A name.", pattern="[a-z]+")


class Nothing(Section):
    """No settings at all."""


def cells(key: str) -> list[str]:
    """The cells of one setting's row, without the key."""
    (line,) = (line for line in tables(Everything.model_json_schema()).splitlines() if line.startswith(f"| `{key}` |"))
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("rate", ["number > 0, ≤ 1", "`0.0002`", "1", "How fast."]),
        ("steps", ["integer ≥ 1 or null", "`null`", "steps", "How long."]),
        ("mode", ["`drop`, `keep`", '`"drop"`', "", "What to do with a ¦ b."]),
        ("betas", ["list of 2: number ≥ 0, < 1, number", "`[0.9, 0.5]`", "", "Two of them."]),
        ("names", ["list of text", "`[]`", "", "Any names."]),
        ("weights", ["mapping of names to number", "`{}`", "", "Weights by name."]),
        ("rows", ["list of **Row**", "`[]`", "", "The rows."]),
        ("on", ["true or false", "`false`", "", "A switch."]),
        ("name", ["text like `[a-z]+`", "required", "", "A name."]),
    ],
)
def test_a_row_gives_type_limits_default_unit_and_meaning(key: str, expected: list[str]) -> None:
    assert cells(key) == expected


def test_a_section_inside_a_section_has_a_table_of_its_own() -> None:
    _, _, inner = tables(Everything.model_json_schema()).partition("**Row**: One row.")
    assert "| `path` | text, not empty | required |  | Where it lies. |" in inner


def test_every_field_of_a_section_is_a_row() -> None:
    rows = [line for line in tables(Everything.model_json_schema()).splitlines() if line.startswith("| `")]
    assert len(rows) == len(Everything.model_fields) + len(Row.model_fields)


def test_a_section_without_settings_says_so() -> None:
    assert tables(Nothing.model_json_schema()) == "No settings."
