"""Finds where contents stand in a rendered conversation, by rendering it once more with marked contents.

Each content gets a private character before and after it (inside its outer whitespace, which templates may trim). If
the second rendering without those characters is the first one, letter by letter, then the characters say where each
content begins and ends: nothing is searched, and equal texts cannot be mixed up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pegbox_data.template import RenderError, Talk

if TYPE_CHECKING:
    from pegbox_data.template import ChatTemplate, Message

FIRST = 0xF0000
MOST = 0xFFFD // 2
PRIVATE = re.compile("[\U000f0000-\U000ffffd]")
FIELDS = ("content", "reasoning_content", "tool_calls")


class Border(NamedTuple):
    """Where a field of a message stands in the text: characters [start, end), None where its border was cut away or
    stands twice.

    `lead` counts the whitespace of the field before `start`.
    """

    start: int | None
    end: int | None
    lead: int


Borders = Mapping[tuple[int, str], Border]
"""By message index and field; a field that the template renders nowhere is missing."""


def borders(template: ChatTemplate, talk: Talk, text: str, prompt: bool = False) -> Borders | None:
    """The borders of all contents, reasonings and names of last tool calls; None if they cannot be told."""
    if len(talk.messages) * len(FIELDS) > MOST or PRIVATE.search(text):
        return None
    marked = [_marked(message, index) for index, message in enumerate(talk.messages)]
    try:
        rendered = template.render(talk._replace(messages=marked), prompt)
    except RenderError:
        return None
    if PRIVATE.sub("", rendered) != text:
        return None
    places: dict[int, list[int]] = {}
    for removed, match in enumerate(PRIVATE.finditer(rendered)):
        places.setdefault(ord(match[0]) - FIRST, []).append(match.start() - removed)
    found: dict[tuple[int, str], Border] = {}
    for index, message in enumerate(talk.messages):
        for number, field in enumerate(FIELDS):
            code = 2 * (len(FIELDS) * index + number)
            start, end = places.get(code, []), places.get(code + 1, [])
            if start or end:
                lead = _lead(message.get(field)) if field != "tool_calls" else 0
                found[index, field] = Border(_only(start), _only(end), lead)
    return found


def _marked(message: Message, index: int) -> Message:
    made = dict(message)
    for number, field in enumerate(FIELDS):
        code = FIRST + 2 * (len(FIELDS) * index + number)
        value = message.get(field)
        if field == "tool_calls":
            if value:
                made[field] = _named(value, code)
        elif isinstance(value, str) and value.strip():
            made[field] = _around(value, code)
            if field == "reasoning_content" and "thinking" in message:
                made["thinking"] = made[field]
    return made


def _around(value: str, code: int) -> str:
    lead, core = _lead(value), value.strip()
    return f"{value[:lead]}{chr(code)}{core}{chr(code + 1)}{value[lead + len(core) :]}"


def _named(calls: Sequence[Any], code: int) -> list[Any]:
    """Tool calls, the name of the last one marked."""
    last = calls[-1]
    function = last.get("function", last)
    named = {**function, "name": _around(function["name"], code)}
    return [*calls[:-1], {**last, "function": named} if "function" in last else named]


def _only(places: Sequence[int]) -> int | None:
    return places[0] if len(places) == 1 else None


def _lead(value: object) -> int:
    return len(value) - len(value.lstrip()) if isinstance(value, str) else 0
