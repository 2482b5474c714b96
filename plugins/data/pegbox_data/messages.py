"""Reads and checks the messages of a row: roles, contents, reasoning, tool calls, and what of them is trained.

Contents may be strings or lists of text parts. Parts are joined before the template sees them; where a part or a
character range says whether it is trained, its place in the joined text is kept as a `Mark`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from pegbox.errors import DataError, did_you_mean

from pegbox_data.formats import column
from pegbox_data.marks import details, joined

if TYPE_CHECKING:
    from pegbox_data.formats import SourceRow
    from pegbox_data.marks import Mark
    from pegbox_data.template import Message

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
FIELDS = {
    "messages": "messages",
    "role": "role",
    "content": "content",
    "reasoning": "reasoning_content",
    "tool_calls": "tool_calls",
    "train": "train",
    "weight": "weight",
    "train_detail": "train_detail",
    "tools": "tools",
    "system": "system",
    "template_kwargs": "chat_template_kwargs",
}
"""What rows and messages hold, by our names, and what it is called unless the config says otherwise."""
THINKING = re.compile(r"\s*<(think|thinking)>\n?(.*?)\n?</\1>\s*", re.DOTALL)


class Said(NamedTuple):
    """One message as read: for the template, and what it says about being trained (None: nothing)."""

    message: Message
    train: bool | None
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class MessageReader:
    """Reads rows whose columns and roles have the names that `fields` and `roles` say.

    Attributes:
        split_thinking: take thinking between tags at the start of an answer out of it, as its reasoning.
    """

    fields: Mapping[str, str]
    roles: Mapping[str, str]
    split_thinking: bool = False

    def __call__(self, row: SourceRow) -> list[Said]:
        """The messages of a row, as templates want them."""
        name = self.fields["messages"]
        return self.listed(column(row, name, "messages"), name)

    def listed(self, value: Any, name: str) -> list[Said]:
        """The messages of a list, or of a JSON string of one, that stands in the column `name`."""
        listed = parsed(value, name)
        if not isinstance(listed, list | tuple):
            raise DataError(
                f"'{name}' is {shown(listed)}",
                "It must be a list of messages.",
                "Write it as [{role: user, content: ...}, {role: assistant, content: ...}].",
            )
        if not listed:
            raise DataError(f"'{name}' is empty", "A conversation needs at least one message.", "Remove the row.")
        return [self._said(number, message) for number, message in enumerate(listed, 1)]

    def _said(self, number: int, message: Any) -> Said:
        if not isinstance(message, Mapping):
            raise DataError(
                f"message {number} is {shown(message)}",
                "A message has a role and a content.",
                "Write it as {role: user, content: ...}.",
            )
        names = self.fields
        role, calls = self._role(number, message), message.get(names["tool_calls"])
        if len(message) == 2 and isinstance(message.get(names["content"]), str) and not self.split_thinking:
            return Said({"role": role, "content": message[names["content"]]}, None, ())
        if names["content"] not in message and not calls:
            raise _missing(number, message, names["content"], "content")
        content = message.get(names["content"])
        if not isinstance(content, str | list | tuple) and not (content is None and calls):
            raise DataError(
                f"message {number} ({role}) has the content {shown(content)}",
                "A content is a string or a list of text parts.",
                "Write it as text.",
            )
        content, marks = joined(content, "content", number)
        reasoning, own = joined(message.get(names["reasoning"]), "reasoning_content", number)
        marks += own
        if names["train_detail"] in message:
            marks += details(message[names["train_detail"]], content or "", number)
        if self.split_thinking and role == "assistant" and isinstance(content, str) and reasoning is None:
            content, reasoning = _split(content, marks, number)
        made = {key: value for key, value in message.items() if value is not None and key not in self._taken}
        made["role"] = role
        if content is not None:
            made["content"] = content
        if reasoning is not None:
            made |= {"reasoning_content": reasoning, "thinking": reasoning}
        if calls:
            made["tool_calls"] = _calls(parsed(calls, names["tool_calls"]), number)
        return Said(made, _flag(number, message.get(names["train"]), message.get(names["weight"])), marks)

    @cached_property
    def _taken(self) -> frozenset[str]:
        keys = ("role", "content", "reasoning", "tool_calls", "train", "weight", "train_detail")
        return frozenset(self.fields[key] for key in keys)

    def _role(self, number: int, message: Mapping[str, Any]) -> str:
        name = self.fields["role"]
        if name not in message:
            raise _missing(number, message, name, "role")
        role = message[name]
        own_name = role if isinstance(role, str) else ""
        known = self.roles.get(own_name, own_name if own_name in ROLES else None)
        if known is None:
            raise _unknown_role(number, role)
        return known


def _split(content: str, marks: Sequence[Mark], number: int) -> tuple[str, str | None]:
    """An answer without the thinking between tags that it begins with, and that thinking."""
    found = THINKING.match(content)
    if found is None:
        return content, None
    if marks:
        raise DataError(
            f"message {number} has thinking to split and character ranges to train",
            "The ranges count characters of the text before the split.",
            "Write the thinking into reasoning_content yourself, or leave out split_thinking.",
        )
    return content[found.end() :], found[2]


def _calls(calls: Any, number: int) -> list[Any]:
    """Tool calls with arguments as objects, as templates want them; OpenAI's layout has JSON strings."""
    if not isinstance(calls, list | tuple):
        raise DataError(
            f"message {number} has tool_calls: {shown(calls)}", "It must be a list of calls.", "Correct the calls."
        )
    return [_call(call, number) for call in calls]


def _call(call: Any, number: int) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"message {number} has the tool call {shown(call)}",
            "A call names a function and its arguments.",
            "Write it as {type: function, function: {name: ..., arguments: {...}}}.",
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(
                f"message {number} calls {function['name']} with arguments that are no JSON: {error}",
                f"They begin {shown(function['arguments'])}.",
                "Write them as an object.",
            ) from error
    made = {**function, "arguments": arguments}
    rest = {key: value for key, value in call.items() if value is not None}
    return {**rest, "function": made} if "function" in call else made


def _flag(number: int, train: Any, weight: Any) -> bool | None:
    """What `train: true/false` or `weight: 0/1` of a message say; None if it has neither."""
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


def _missing(number: int, message: Mapping[str, Any], name: str, canonical: str) -> DataError:
    return DataError(
        f"message {number} has no '{name}'",
        f"It has: {', '.join(map(str, message)) or 'nothing'}.",
        f"Name the field that holds it in the config: fields: {{{canonical}: ...}}",
    )
