"""The format `chat`: conversations in OpenAI's layout, trained on what the assistant says.

Names of columns, fields and roles are mapped, so that other layouts are read too. Which messages, parts and character
ranges are trained, the options and the rows say; which tokens these are, `conversation` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pegbox.errors import DataError
from pegbox.section import Section, setting
from pydantic import JsonValue

from pegbox_data.conversation import Conversation, Wanted
from pegbox_data.dialogue import rendered, tools_of, variables_of, with_system
from pegbox_data.messages import FIELDS, MessageReader, Said
from pegbox_data.template import Talk

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Rendered, Renderer, SourceRow


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
            system = row.get(fields["system"])
            said = with_system(read(row), system, options.default_system, drop=options.drop_system)
            tools = tools_of(row.get(fields["tools"]), fields["tools"])
            variables = variables_of(row.get(fields["template_kwargs"]), fields["template_kwargs"])
            talk = Talk([one.message for one in said], tools, variables)
            return rendered(conversation, talk, _wanted(said, options))

        return render


chat = ChatFormat()


def _wanted(said: Sequence[Said], options: ChatOptions) -> Wanted:
    return Wanted(
        _trained(said, options),
        {index: one.marks for index, one in enumerate(said) if one.marks},
        options.train_end_of_turn,
        options.train_end_of_sequence or options.train_end_of_turn,
        options.train_on_inputs,
    )


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
