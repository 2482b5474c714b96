"""The errors of the core as a page: id, what, why and what to type next, from the catalog that raises them."""

from __future__ import annotations

from collections.abc import Mapping

from pegbox.errors import KINDS, catalog

INTRO = """# Errors of the core

Every error that Pegbox raises on purpose says what is wrong (with the value seen), why, and what to type next; it
prints no trace. Words in braces are filled in when it happens. Plugins raise errors of the same form and classes;
theirs are not listed here.

Exit code 2: the input is wrong. Exit code 1: a run failed although its input was right."""


def page() -> str:
    """All errors on one page, in the catalog's order."""
    return "\n\n".join([INTRO, *(section(name) for name in catalog())])


def section(name: str) -> str:
    """One error."""
    entry: Mapping[str, str] = catalog()[name]
    kind = KINDS[entry["kind"]]
    parts = [f"## {name}", f"`{kind.__name__}`, exit code {kind.exit_code}"]
    listed = [f"- **{label}**: {_braces(entry[label])}" for label in ("what", "why", "next") if entry.get(label)]
    return "\n\n".join([*parts, "\n".join(listed)])


def _braces(text: str) -> str:
    return " ".join(text.replace("!r}", "}").replace("{{", "{").replace("}}", "}").split())
