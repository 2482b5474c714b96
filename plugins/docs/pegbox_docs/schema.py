"""The JSON schema of whole configs: the core's keys and the sections of plugins. Editors complete and check with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pegbox.config import RunSection

from pegbox_docs.installed import describe, describe_all


def config_schema(names: Sequence[str] | None = None) -> dict[str, Any]:
    """The schema of a config with these plugins; without names, with every installed one."""
    whole = RunSection.model_json_schema()
    whole["title"] = "A config of Pegbox"
    whole["properties"]["extends"] = {"type": "string", "description": "A config or recipe that this one builds upon."}
    for plugin in [describe(name) for name in names] if names else describe_all():
        if plugin.schema:
            whole["properties"][plugin.name] = _moved(plugin.schema, f"#/properties/{plugin.name}/$defs/")
    return whole


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references lead to where its definitions lie in the whole."""
    if isinstance(schema, dict):
        return {
            key: place + value.removeprefix("#/$defs/")
            if key == "$ref" and isinstance(value, str)
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema
