"""What this package declares, looked up before any plugin is asked: so that mistakes show when a config is read."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

from pegbox.errors import did_you_mean
from pydantic import ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pegbox.types import Item


def imported(item: Item) -> Any:
    """The target of an item: an object, or the one that `package.module:attribute` names."""
    if not isinstance(item.target, str):
        return item.target
    module, _, attribute = item.target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_options(kind: str, name: str, options: Mapping[str, object]) -> None:
    """Validate the options of one of our own formats or sources; those of other plugins are not known here.

    Raises:
        ValueError: in the words of the other mistakes of the section.
    """
    from pegbox_data import DataPlugin

    item = next((item for item in DataPlugin().register_items() if (item.kind, item.name) == (kind, name)), None)
    if item is None or not options:
        return
    schema = imported(item).options
    try:
        schema.model_validate_json(json.dumps(dict(options)))
    except ValidationError as error:
        raise ValueError("; ".join(_explained(schema, detail, kind, name) for detail in error.errors())) from None


def _explained(schema: Any, detail: Any, kind: str, name: str) -> str:
    where = "options" if kind == "format" else "source_options"
    key = ".".join(map(str, detail["loc"])) or where
    if detail["type"] == "extra_forbidden":
        known = did_you_mean(key, schema.model_fields, "Known:")
        return f"unknown key '{key}' in the {where} of the {kind} '{name}'. {known.rstrip('?.')}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}.{key} of the {kind} '{name}' is {detail['input']!r}: {message[0].lower() + message[1:]}"
