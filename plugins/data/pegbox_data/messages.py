"""Reads and checks the messages of a row: roles, contents, and flags that leave a message untrained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pegbox.errors import DataError, did_you_mean

from pegbox_data.formats import column

if TYPE_CHECKING:
    from pegbox_data.formats import SourceRow
    from pegbox_data.template import Message

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


@dataclass(frozen=True)
class MessageReader:
    """Reads rows whose columns and roles have the names that `fields` and `roles` say."""

    fields: Mapping[str, str]
    roles: Mapping[str, str]

    def __call__(self, row: SourceRow) -> tuple[list[Message], list[bool | None]]:
        """The messages as templates want them, and what each says about being trained (None: nothing)."""
        name = self.fields["messages"]
        listed = parsed(column(row, name, "messages"), name)
        if not isinstance(listed, list | tuple):
            raise DataError(
                f"'{name}' is {shown(listed)}",
                "It must be a list of messages.",
                "Write it as [{role: user, content: ...}, {role: assistant, content: ...}].",
            )
        if not listed:
            raise DataError(f"'{name}' is empty", "A conversation needs at least one message.", "Remove the row.")
        messages = [self._message(number, message) for number, message in enumerate(listed, 1)]
        return messages, [_flag(number, message) for number, message in enumerate(messages, 1)]

    def _message(self, number: int, message: Any) -> Message:
        if not isinstance(message, Mapping):
            raise DataError(
                f"message {number} is {shown(message)}",
                "A message has a role and a content.",
                "Write it as {role: user, content: ...}.",
            )
        role_key, content_key = self.fields["role"], self.fields["content"]
        role, content = message.get(role_key), message.get(content_key)
        if role_key not in message:
            raise _missing(number, message, role_key, "role")
        if content_key not in message and not message.get("tool_calls"):
            raise _missing(number, message, content_key, "content")
        own_name = role if isinstance(role, str) else ""
        known = self.roles.get(own_name, own_name if own_name in ROLES else None)
        if known is None:
            raise _unknown_role(number, role)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(
                f"message {number} ({role}) has the content {shown(content)}",
                "A content is a string; lists of parts are not supported.",
                "Join its parts into one string.",
            )
        if known == role and role_key == "role" and content_key == "content":
            return message
        rest = {key: value for key, value in message.items() if key not in (role_key, content_key)}
        return {"role": known, "content": content, **rest}


def _flag(number: int, message: Message) -> bool | None:
    """What `train: true/false` or `weight: 0/1` of a message say; None if it has neither."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"message {number} has train: {shown(train)}", "It is true or false.", "Correct the flag.")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(
            f"message {number} has weight: {shown(weight)}",
            "A message counts (1) or does not (0).",
            "Correct the weight.",
        )
    if train is not None and weight is not None and train is not bool(weight):
        raise DataError(
            f"message {number} has train: {shown(train)} and weight: {weight}",
            "They disagree.",
            "Keep one.",
        )
    if train is not None:
        return train
    return None if weight is None else bool(weight)


def parsed(value: Any, name: str) -> Any:
    """The value itself, or what a JSON string holds (as in CSV files)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(
            f"'{name}' is a string but no JSON: {error}", f"It begins {shown(value)}.", "Write it as a list."
        ) from error


def shown(value: Any) -> str:
    """A value of a row as messages quote it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_role(number: int, role: Any) -> DataError:
    return DataError(
        f"message {number} has the unknown role {shown(role)}",
        did_you_mean(str(role), ROLES, "Known roles:"),
        f"Correct it, or map it in the config: options: {{roles: {{{role}: user}}}}",
    )


def _missing(number: int, message: Message, name: str, canonical: str) -> DataError:
    return DataError(
        f"message {number} has no '{name}'",
        f"It has: {', '.join(map(str, message)) or 'nothing'}.",
        f"Name the field that holds it in the config: fields: {{{canonical}: ...}}",
    )
