"""Config sections as tables: one row for each setting, from the JSON schema of the section.

The schema holds all that a reader needs as plain data: type, default, limits, description, unit; sections inside a
section get a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "pattern": "like `{}`",
}
NAMES = {"string": "text", "boolean": "true or false", "null": "null", "integer": "integer", "number": "number"}


def tables(schema: Schema) -> str:
    """The settings of a section, and of the sections inside it, as markdown tables."""
    if not schema.get("properties"):
        return "No settings."
    parts = [_table(schema)]
    for name, inner in _inner_sections(schema):
        parts.append(f"**{name}**: {_sentence(inner)}\n\n{_table(inner)}")
    return "\n\n".join(parts)


def _table(schema: Schema) -> str:
    rows = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    required = schema.get("required", ())
    for key, field in schema["properties"].items():
        default = "required" if key in required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
        unit = field.get("unit", "")
        cells = (f"`{key}`", kind(field), default, unit, field.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows)


def kind(field: Schema) -> str:
    """The type of a setting with its limits: `integer ≥ 1 or null`."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(option) for option in field["anyOf"]))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return "any value" if name == "JsonValue" else f"**{name}**"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return _list(field)
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"mapping of names to {kind(values)}" if isinstance(values, Mapping) and values else "mapping"
    limits = [form.format(field[key]) for key, form in LIMITS.items() if key in field]
    name = NAMES.get(field.get("type", ""), "any value")
    if field.get("minLength"):
        name += ", not empty" if field["minLength"] == 1 else f", at least {field['minLength']} characters"
    return " ".join([name, ", ".join(limits)]).strip()


def _list(field: Schema) -> str:
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: {', '.join(map(kind, field['prefixItems']))}"
    least, most = field.get("minItems"), field.get("maxItems")
    limits = [f"at least {least}" if least else "", f"at most {most}" if most else ""]
    bounds = " and ".join(filter(None, limits))
    return f"list of {kind(field.get('items', {}))}{f', {bounds}' if bounds else ''}"


def _inner_sections(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name, inner in schema.get("$defs", {}).items():
        if inner.get("properties"):
            yield name, inner


def _sentence(schema: Schema) -> str:
    return " ".join(schema.get("description", "").split())
