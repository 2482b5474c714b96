"""The rows of a JSONL file as prompts: a conversation (`messages`) or a text (`prompt`) in each.

Every row is read and encoded before the first token is generated, so a mistake in the last one costs no hour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.errors import DataError

if TYPE_CHECKING:
    from pegbox.record import Json

    from pegbox_chat.opened import OpenModel

KEYS = ("messages", "prompt")


@dataclass(frozen=True)
class Prompt:
    """One row.

    Attributes:
        index: its place in the file, from 0.
        row: as it was read.
        ids: its tokens.
        where: `file:line`, for messages.
    """

    index: int
    row: Mapping[str, Json]
    ids: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        field: the name that answers get in the output.
        system: what the model is told before conversations that begin without a system message.
        drop_answer: leave out what the assistant says at the end of a conversation.
        max_tokens: longest answer.
    """

    field: str
    system: str | None
    drop_answer: bool
    max_tokens: int


def read_prompts(path: Path, model: OpenModel, reading: Reading) -> list[Prompt]:
    """Every row of the file as a prompt.

    Raises:
        DataError: the file is missing or empty, or a row is no prompt, or too long; with file and line.
    """
    prompts: list[Prompt] = []
    for line, row in _rows(path):
        where = f"{path}:{line}"
        if reading.field in row:
            raise DataError(
                f"{where}: the row has a field '{reading.field}' already",
                "The answer would take its place.",
                "Name another one with --field.",
            )
        ids = _encode(row, where, model, reading)
        if model.limit is not None and len(ids) + reading.max_tokens > model.limit:
            raise DataError(
                f"{where}: {len(ids)} tokens and an answer of up to {reading.max_tokens} are more than the "
                f"{model.limit} that the model reads",
                "The answer could be cut short.",
                f"Shorten the row, or set --max-tokens to {max(1, model.limit - len(ids))} or less.",
            )
        prompts.append(Prompt(len(prompts), row, tuple(ids), where))
    if not prompts:
        raise DataError(f"{path} holds no rows", "Each line is one JSON object.", "Name another file.")
    return prompts


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Json]]]:
    if not path.is_file():
        raise DataError(f"there is no file {path}", "It is the input, one JSON object a line.", "Correct its name.")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number} is no JSON: {error}", "Each line is one JSON object.", "Correct the line."
                ) from error
            if not isinstance(row, dict) or sum(key in row for key in KEYS) != 1:
                held = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{path}:{number} holds {held or 'nothing'}, and not one of {' and '.join(KEYS)}",
                    "`messages` is a conversation to go on with, `prompt` a text (or a conversation too).",
                    "Rename or remove fields of the row.",
                )
            yield number, row


def _encode(row: Mapping[str, Json], where: str, model: OpenModel, reading: Reading) -> list[int]:
    said = row.get("messages", row.get("prompt"))
    if isinstance(said, str):
        ids = list(model.tokenizer(said)["input_ids"])
    else:
        ids = _conversation(_messages(said, where, reading), row, where, model)
    if not ids:
        raise DataError(f"{where}: the prompt is empty", "There is nothing to go on from.", "Remove the row.")
    return ids


def _messages(said: object, where: str, reading: Reading) -> list[dict[str, object]]:
    if not isinstance(said, list) or not all(isinstance(message, dict) and "role" in message for message in said):
        raise DataError(
            f"{where}: the conversation is no list of messages",
            "Each message has a role and a content.",
            'Write it as [{"role": "user", "content": "..."}].',
        )
    messages = list(said)
    while reading.drop_answer and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the conversation {'is empty' if not messages else 'ends with the assistant'}",
            "The model is to say what comes next.",
            "Remove the last message, or give --drop-answer.",
        )
    if reading.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": reading.system})
    return messages


def _conversation(
    messages: list[dict[str, object]], row: Mapping[str, Json], where: str, model: OpenModel
) -> list[int]:
    import jinja2

    if model.tokenizer.chat_template is None:
        raise DataError(
            f"{where} is a conversation, and the tokenizer has no chat template",
            "Nothing says how a conversation is written for this model.",
            "Give texts in the field `prompt`, or a model with a template.",
        )
    options = row.get("chat_template_kwargs") or {}
    try:
        encoded = model.tokenizer.apply_chat_template(
            messages,
            tools=row.get("tools") or None,
            add_generation_prompt=True,
            return_dict=True,
            **(options if isinstance(options, dict) else {}),
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise DataError(
            f"{where}: the model's chat template does not take this conversation: {error}",
            "Templates may refuse roles or an order of roles.",
            "Correct the row.",
        ) from error
    return list(encoded["input_ids"])
