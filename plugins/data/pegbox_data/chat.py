"""The format `chat`: conversations in OpenAI's layout, trained on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pegbox.errors import DataError
from pegbox.section import Section, setting
from pydantic import JsonValue

from pegbox_data.conversation import Conversation
from pegbox_data.messages import MessageReader, parsed

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Rendered, Renderer, SourceRow
    from pegbox_data.template import Message


class ChatOptions(Section):
    """Options of the format `chat`."""

    train_roles: tuple[str, ...] = setting(
        ("assistant",),
        "Roles whose messages are trained; of others than the assistant the whole turn, header included.",
        min_length=1,
    )
    turns: Literal["all", "last"] = setting(
        "all", "Train every message of these roles, or only the last one of each row."
    )
    roles: dict[str, str] = setting(
        {}, "Roles of the file by their name there, such as `{human: user, gpt: assistant}`."
    )
    template_kwargs: dict[str, JsonValue] = setting(
        {}, "Variables for the chat template, such as `{enable_thinking: false}`."
    )


class ChatFormat:
    """Rows with a list of messages (or a JSON string of one), each with a role and a text.

    A row may have tools, and a message a flag: `train: false` or `weight: 0` leave it untrained.
    """

    fields: ClassVar[Mapping[str, str]] = {
        "messages": "messages",
        "role": "role",
        "content": "content",
        "tools": "tools",
    }
    options = ChatOptions

    def open(self, fields: Mapping[str, str], options: ChatOptions, processor: Processor) -> Renderer:
        conversation = Conversation.of(processor, options.template_kwargs)
        read = MessageReader(fields, options.roles)

        def render(row: SourceRow) -> Rendered:
            messages, flags = read(row)
            tools = parsed(row.get(fields["tools"]), fields["tools"])
            return conversation.render(messages, _trained(messages, flags, options), tools or None)

        return render


chat = ChatFormat()


def _trained(messages: Sequence[Message], flags: Sequence[bool | None], options: ChatOptions) -> list[int]:
    """Indices of the messages to train."""
    trained = []
    for index, (message, flag) in enumerate(zip(messages, flags, strict=True)):
        of_role = message["role"] in options.train_roles
        if flag and not of_role:
            raise DataError(
                f"message {index + 1} ({message['role']}) asks to be trained",
                f"Only these roles are: {', '.join(options.train_roles)}.",
                "Remove its train or weight flag, or add the role: options: {train_roles: [...]}",
            )
        if of_role and flag is not False:
            trained.append(index)
    return trained if options.turns == "all" else trained[-1:]
