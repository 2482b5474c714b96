"""The format `chat`: conversations in OpenAI's layout, trained on what the assistant says.

Names of columns, fields and roles are mapped, so that other layouts are read too. Which messages, parts and character
ranges are trained, the options and the rows say; which tokens these are, `conversation` finds out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pegbox.errors import DataError
from pegbox.section import Section, setting
from pydantic import JsonValue

from pegbox_data.conversation import Conversation, RefusedError, Wanted
from pegbox_data.messages import FIELDS, MessageReader, Said, parsed, shown
from pegbox_data.template import Talk

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Rendered, Renderer, SourceRow
    from pegbox_data.template import Message

ABSENT = "absent"


class ChatOptions(Section):
    """Options of the format `chat`."""

    train_roles: tuple[str, ...] = setting(
        ("assistant",),
        "Roles whose messages are trained; of others than the assistant the whole turn, header included. None at all: "
        "only what messages, parts and ranges mark.",
    )
    turns: Literal["all", "last"] = setting(
        "all", "Train every message of these roles, or only the last one of each row."
    )
    train_end_of_turn: Literal["all", "turn", "last", "none"] = setting(
        "turn",
        "Which end-of-turn tokens are trained: of trained turns, of the last trained one, of turns of all roles, none.",
    )
    train_end_of_sequence: Literal["all", "turn", "last", "none"] | None = setting(
        None, "The same for an end-of-sequence token that stands apart; as `train_end_of_turn` if not set."
    )
    train_on_inputs: bool = setting(False, "Train every token of the row.")
    roles: dict[str, str] = setting(
        {}, "Roles of the file by their name there, such as `{human: user, gpt: assistant}`."
    )
    split_thinking: bool = setting(
        False, "Make `<think>...</think>` at the start of an answer its reasoning, for templates that place it."
    )
    default_system: str | None = setting(None, "System message of rows that have none.")
    drop_system: bool = setting(False, "Leave out the system messages of the rows.")
    template_kwargs: dict[str, JsonValue] = setting(
        {}, "Variables for the chat template, such as `{enable_thinking: false}`; a column may set them per row."
    )


class ChatFormat:
    """Rows with a list of messages (or a JSON string of one), each with a role and a text.

    A row may have tools, a system message and template variables of its own; a message reasoning, tool calls, a list
    of parts, and flags: `train: false` or `weight: 0` leave it, or a part of it, untrained.
    """

    fields: ClassVar[Mapping[str, str]] = FIELDS
    options = ChatOptions

    def open(self, fields: Mapping[str, str], options: ChatOptions, processor: Processor) -> Renderer:
        conversation = Conversation.of(processor, options.template_kwargs)
        read = MessageReader(fields, options.roles, options.split_thinking)

        def render(row: SourceRow) -> Rendered:
            said = _with_system(read(row), row.get(fields["system"]), options)
            tools = _tools(row.get(fields["tools"]), fields["tools"])
            talk = Talk([one.message for one in said], tools, _variables(row.get(fields["template_kwargs"]), fields))
            return _rendered(conversation, talk, said, options)

        return render


chat = ChatFormat()


def _rendered(conversation: Conversation, talk: Talk, said: Sequence[Said], options: ChatOptions) -> Rendered:
    wanted = Wanted(
        _trained(said, options),
        {index: one.marks for index, one in enumerate(said) if one.marks},
        options.train_end_of_turn,
        options.train_end_of_sequence or options.train_end_of_turn,
        options.train_on_inputs,
    )
    try:
        return conversation.render(talk, wanted)
    except RefusedError as refused:
        for other in _other_layouts(talk):
            with suppress(RefusedError):
                return conversation.render(other, wanted)
        raise refused


def _trained(said: Sequence[Said], options: ChatOptions) -> list[int]:
    """Indices of the messages to train. Without roles to train, flags alone decide."""
    trained = []
    for index, one in enumerate(said):
        of_role = one.message["role"] in options.train_roles
        if one.train and not of_role and options.train_roles:
            raise DataError(
                f"message {index + 1} ({one.message['role']}) asks to be trained",
                f"Only these roles are: {', '.join(options.train_roles)}.",
                "Remove its train or weight flag, add the role: options: {train_roles: [...]}, or let flags alone "
                "decide: options: {train_roles: []}",
            )
        if one.train if one.train is not None else of_role:
            trained.append(index)
    return trained if options.turns == "all" else trained[-1:]


def _with_system(said: list[Said], text: Any, options: ChatOptions) -> list[Said]:
    """The messages with the row's own or the default system message, or without any."""
    if text is not None and not isinstance(text, str):
        raise DataError(f"the system message is {shown(text)}", "It must be a string.", "Write it as text.")
    if options.drop_system:
        return [one for one in said if one.message["role"] != "system"]
    if said[0].message["role"] in ("system", "developer"):
        return said
    chosen = text or options.default_system
    return [Said({"role": "system", "content": chosen}, None, ()), *said] if chosen else said


def _tools(value: Any, name: str) -> object:
    """The tools of a row; each may be a JSON string, and so may the list."""
    tools = parsed(value, name)
    if tools is not None and not isinstance(tools, list | tuple):
        raise DataError(f"'{name}' is {shown(tools)}", "It must be a list of tools.", "Write it as [{...}].")
    return [parsed(tool, name) for tool in tools] if tools else None


def _variables(value: Any, fields: Mapping[str, str]) -> Mapping[str, object]:
    name = fields["template_kwargs"]
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
