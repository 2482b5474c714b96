"""The base of every config section, and `setting`, which declares one documented field.

A section is a frozen pydantic model that forbids unknown keys. Every field says what it means and in which unit, so
that the reference pages, the JSON schema and the error messages all come from one place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pegbox.context import Context


class Section(BaseModel):
    """Base of config sections: frozen, unknown keys forbidden, defaults validated, no type coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=())

    def check(self, ctx: Context) -> None:
        """Raise what is wrong with this section beside the others, such as a name that no active plugin declares.

        It is asked when a run is composed, so a plan sees it too: read nothing, and import nothing heavy.
        """


S = TypeVar("S", bound=Section)


class Bounds(TypedDict, total=False):
    """Limits of a value, as pydantic's `Field` takes them."""

    gt: float
    ge: float
    lt: float
    le: float
    min_length: int
    pattern: str


def setting(default: Any, doc: str, *, unit: str = "", **bounds: Unpack[Bounds]) -> Any:
    """A documented field of a section; `...` as default makes it required.

    Args:
        default: the value when the config is silent (the paper's, where there is one).
        doc: one sentence: what it does.
        unit: unit of a number, e.g. `tokens`, `steps`, `1` for a plain ratio.
        bounds: `gt ge lt le min_length pattern`, checked by pydantic.
    """
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else {}, **bounds)
