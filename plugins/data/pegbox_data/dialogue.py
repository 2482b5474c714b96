"""What formats of conversations have in common: system messages, tools, template variables, and rendering.

Templates differ in how they want tool calls to be laid out; a row that one refuses is offered in the other layouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pegbox.errors import DataError

from pegbox_data.conversation import Conversation, RefusedError, Wanted
from pegbox_data.messages import Said, parsed, shown

if TYPE_CHECKING:
    from pegbox_data.formats import Rendered
    from pegbox_data.template import Message, Talk

ABSENT = "absent"


def rendered(conversation: Conversation, talk: Talk, wanted: Wanted | None) -> Rendered:
    """A conversation as text, in the first layout of tool calls that the template takes; without anything wanted as a
    prompt to answer.
    """
    try:
        return _once(conversation, talk, wanted)
    except RefusedError as refused:
        for other in _other_layouts(talk):
            with suppress(RefusedError):
                return _once(conversation, other, wanted)
        raise refused


def _once(conversation: Conversation, talk: Talk, wanted: Wanted | None) -> Rendered:
    return conversation.render_prompt(talk) if wanted is None else conversation.render(talk, wanted)


def with_system(said: list[Said], text: Any, default: str | None, *, drop: bool) -> list[Said]:
    """The messages with the row's own or the default system message, or without any.

    Raises:
        DataError: the row's own is no text.
    """
    if text is not None and not isinstance(text, str):
        raise DataError(f"the system message is {shown(text)}", "It must be a string.", "Write it as text.")
    if drop:
        return [one for one in said if one.message["role"] != "system"]
    if said and said[0].message["role"] in ("system", "developer"):
        return said
    chosen = text or default
    return [Said({"role": "system", "content": chosen}, None, ()), *said] if chosen else said


def tools_of(value: Any, name: str) -> object:
    """The tools of a row, from the column `name`; each may be a JSON string, and so may the list."""
    tools = parsed(value, name)
    if tools is not None and not isinstance(tools, list | tuple):
        raise DataError(f"'{name}' is {shown(tools)}", "It must be a list of tools.", "Write it as [{...}].")
    return [parsed(tool, name) for tool in tools] if tools else None


def variables_of(value: Any, name: str) -> Mapping[str, object]:
    """The template variables of a row, from the column `name`."""
    variables = parsed(value, name)
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise DataError(
            f"'{name}' is {shown(variables)}", "It holds variables for the template.", "Write it as {name: value}."
        )
    # Columnar files give every row every name: those that a row does not set are null.
    return {key: one for key, one in variables.items() if one is not None}


def _other_layouts(talk: Talk) -> Iterator[Talk]:
    """The same conversation as other templates expect tool calls: a content of null or nothing beside them, arguments
    as JSON text.
    """
    if any(message.get("tool_calls") for message in talk.messages):
        for texts in (False, True):
            for content in (ABSENT, None, ""):
                if texts or content is not ABSENT:
                    yield talk._replace(messages=[_laid_out(message, content, texts) for message in talk.messages])


def _laid_out(message: Message, content: object, texts: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    made = dict(message)
    if "content" not in made and content is not ABSENT:
        made["content"] = content
    if texts:
        made["tool_calls"] = [_as_text(call) for call in message["tool_calls"]]
    return made


def _as_text(call: Any) -> Any:
    function = call.get("function", call)
    made = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": made} if "function" in call else made
