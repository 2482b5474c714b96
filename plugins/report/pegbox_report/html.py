"""Parts of the page that several sections are made of. What they are given is HTML; `text` is not escaped yet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    """A table; heads that begin with `#` are those of numbers."""
    names = "".join(f"<th{' class=number' if name.startswith('#') else ''}>{name.lstrip('#')}</th>" for name in head)
    return f'<div class="table"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def card(title: str, content: str) -> str:
    """A part with a frame and a title."""
    return f'<div class="card"><h3>{title}</h3>{content}</div>'


def text(value: object) -> str:
    """A prompt as text: messages as `role: content`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and "role" in part for part in value):
        return "\n".join(f"{part['role']}: {part.get('content', '')}" for part in value)
    return json.dumps(value, ensure_ascii=False)
