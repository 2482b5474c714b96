"""Our config as YAML, each value with the key that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pegbox.source import parse

COLUMN = 56


def to_yaml(
    config: Mapping[str, Any], sources: Mapping[str, str], title: str, name: str, missing: Sequence[str]
) -> str:
    """The text of a config.

    Args:
        sources: where values came from, by dotted key; written behind them as comments.
        title: the program that it was converted from.
        name: name of the file that was converted.
        missing: what is in that file and not in this config; written as comments at the top.
    """
    head = ["# Not in this config:", *(f"#   {line}" for line in missing)] if missing else []
    return "\n".join([f"# Converted from {name} ({title}).", *head, *_lines(config, sources, "", 0), ""])


def _lines(values: Mapping[str, Any], sources: Mapping[str, str], path: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        source = sources.get(inner)
        start = f"{indent}{_scalar(str(key))}:"
        if isinstance(value, Mapping) and value and any(known.startswith(f"{inner}.") for known in sources):
            yield start
            yield from _lines(value, sources, inner, depth + 1)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield start
            for item in value:
                yield f"{indent}  - {_flow(item)}"
        else:
            line = f"{start} {_flow(value)}"
            yield f"{line.ljust(COLUMN)}  # {source}" if source else line


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return _scalar(value)
    if isinstance(value, float):
        return repr(value)
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, int) or isinstance(value, bool)
        else str(value)
    )


def _scalar(text: str) -> str:
    """A text, in quotes where it would be read as something else."""
    plain = yaml.safe_dump([text], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()[1:-1]
    if "\n" not in plain and parse(f"x: [{plain}]", "text").data["x"] == [text]:
        return plain
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def _escaped(letter: str) -> str:
    known = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(letter) or (letter if letter.isprintable() else f"\\U{ord(letter):08x}")
