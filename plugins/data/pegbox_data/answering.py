"""Prompts and answers of a row as text: what the formats `preference`, `unpaired` and `prompts` have in common.

Either side is a text or a list of messages. Through the chat template a text becomes the user's or the assistant's
message; without it texts are joined as they stand, after the tokenizer's BOS and before EOS. An answer is rendered
together with its prompt, once and whole, and what the assistant says in it is trained as in the format `chat`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pegbox.errors import DataError
from pegbox.section import Section, setting
from pydantic import JsonValue, ValidationInfo, field_validator, model_validator

from pegbox_data.conversation import Conversation, Wanted
from pegbox_data.dialogue import rendered, tools_of, variables_of, with_system
from pegbox_data.findings import Found
from pegbox_data.formats import Rendered, Span, column
from pegbox_data.messages import FIELDS, MessageReader, Said, parsed, shown
from pegbox_data.template import Talk

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import SourceRow

Side = str | list[Said]
"""What a row holds on one side: a text, or messages."""
IN_MESSAGES = {name: FIELDS[name] for name in ("role", "content", "reasoning", "tool_calls", "train", "weight")}
ANSWER_FIELDS = {
    **IN_MESSAGES,
    **{name: FIELDS[name] for name in ("train_detail", "tools", "system", "template_kwargs")},
    "query": "",
}
"""Fields of messages, and of a row beside its prompt and answers."""
BLANK = re.compile(r"\{(\w+)\}")
BLANKS = {"prompt_format": ("system", "prompt"), "answer_format": ("answer",)}


class PromptOptions(Section):
    """Options of all formats with a prompt."""

    chat_template: bool = setting(
        True,
        "Render texts as the user's and the assistant's messages; false joins them as plain text, with BOS before and "
        "EOS after them.",
    )
    prompt_format: str | None = setting(
        None,
        "What a prompt that is a text is put into: `{prompt}` and `{system}`, the row's system message, are filled in.",
    )
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

    @field_validator("prompt_format", "answer_format", check_fields=False)
    @classmethod
    def _knows_its_blanks(cls, text: str | None, info: ValidationInfo) -> str | None:
        known = BLANKS[info.field_name or ""]
        unknown = [name for name in BLANK.findall(text or "") if name not in known]
        if unknown:
            raise ValueError(f"there is nothing to fill in for {{{unknown[0]}}}. Known: {', '.join(known)}. Correct it")
        if text is not None and known[-1] not in BLANK.findall(text):
            raise ValueError(f"it leaves out {{{known[-1]}}}. The text of the row would be lost. Write it in")
        return text

    @model_validator(mode="after")
    def _means_something(self) -> PromptOptions:
        names = ("roles", "split_thinking", "drop_system", "template_kwargs")
        unused = [name for name in names if getattr(self, name)]
        if self.default_system is not None and "{system}" not in (self.prompt_format or ""):
            unused.append("default_system")
        if unused and not self.chat_template:
            raise ValueError(
                f"{unused[0]} means nothing with chat_template: false. It belongs to the chat template. Remove one"
            )
        return self


class AnswerOptions(PromptOptions):
    """Options of all formats with answers."""

    answer_format: str | None = setting(None, "What an answer that is a text is put into: `{answer}` is filled in.")


@dataclass(frozen=True)
class Answering:
    """Reads the sides of rows, and renders prompts with or without an answer.

    Attributes:
        eos: text of the EOS token: an answer that ends with it gets no second one.
    """

    fields: Mapping[str, str]
    options: PromptOptions
    read: MessageReader
    conversation: Conversation | None
    eos: str | None

    @classmethod
    def of(cls, fields: Mapping[str, str], options: PromptOptions, processor: Processor) -> Answering:
        """For one entry. Raises `DataError` if the chat template is to be used and there is none."""
        conversation = Conversation.of(processor, options.template_kwargs) if options.chat_template else None
        reader = MessageReader(fields, options.roles, options.split_thinking)
        return cls(fields, options, reader, conversation, processor.tokenizer.eos_token)

    def side(self, value: Any, name: str) -> Side:
        """What the column `name` holds: a text, a message, or a list of messages (or a JSON string of one)."""
        if isinstance(value, str):
            listed = _messages_in(value, self.fields["role"])
            return value if listed is None else self.read.listed(listed, name)
        if isinstance(value, Mapping):
            return self.read.listed([value], name)
        if isinstance(value, list | tuple):
            return self.read.listed(value, name)
        raise DataError(
            f"'{name}' is {shown(value)}", "It must be a text or a list of messages.", f"Write {name} as text."
        )

    def prompt(self, row: SourceRow, name: str) -> Any:
        """What the column `name` of the prompt holds; a text of the field `query` follows it on a line of its own."""
        asked, query = column(row, name, "prompt"), self.fields["query"]
        further = column(row, query, "query") if query else None
        if further is None or further == "":
            return asked
        texts = isinstance(asked, str) and isinstance(further, str)
        if not texts or _messages_in(asked, self.fields["role"]) is not None:
            raise DataError(
                f"'{name}' and '{query}' are {shown(asked)} and {shown(further)}",
                "A query follows the prompt as text: both must be texts.",
                "Write both as texts, or leave query out of the fields.",
            )
        return f"{asked}\n{further}" if asked else further

    def with_answer(self, row: SourceRow, prompt: Side, answer: Side) -> Rendered:
        """A prompt and an answer, of which the answer is trained."""
        if self.conversation is None:
            return self._plain(self._text(row, prompt), self._answer_text(answer))
        asked, said = self._asked(row, prompt), self._said(answer)
        whole = [*asked, *said]
        trained = [len(asked) + index for index, one in enumerate(said) if _is_trained(one)]
        marks = {index: one.marks for index, one in enumerate(whole) if one.marks}
        return rendered(self.conversation, self._talk(row, whole), Wanted(trained, marks))

    def alone(self, row: SourceRow, prompt: Side) -> Rendered:
        """A prompt that waits for its answer; nothing is trained."""
        if self.conversation is None:
            return Rendered(self._text(row, prompt), [], bos=True, prompt=True)
        return rendered(self.conversation, self._talk(row, self._asked(row, prompt)), None)

    def _plain(self, prompt: str, answer: str) -> Rendered:
        text = prompt + answer
        ended = bool(self.eos) and answer.endswith(str(self.eos))
        notes = () if answer else (Found("empty-answer"),)
        return Rendered(text, [Span(len(prompt), len(text), len(text))], bos=True, eos=not ended, notes=notes)

    def _talk(self, row: SourceRow, whole: Sequence[Said]) -> Talk:
        tools = tools_of(row.get(self.fields["tools"]), self.fields["tools"])
        variables = variables_of(row.get(self.fields["template_kwargs"]), self.fields["template_kwargs"])
        return Talk([one.message for one in whole], tools, variables)

    def _asked(self, row: SourceRow, prompt: Side) -> list[Said]:
        """The messages of a prompt, with the system message."""
        form, system = self.options.prompt_format, row.get(self.fields["system"])
        if isinstance(prompt, str):
            filled = form is not None and "{system}" in form
            asked = [Said({"role": "user", "content": self._filled(row, prompt)}, None, ())]
            return asked if filled else with_system(asked, system, self.options.default_system, drop=self._drops)
        if form is not None:
            raise _for_texts("prompt_format", prompt)
        marked = next((one for one in prompt if one.train or any(mark.train for mark in one.marks)), None)
        if marked is not None:
            raise DataError(
                f"a message of the prompt ({marked.message['role']}) asks to be trained",
                "Of a prompt nothing is trained.",
                "Remove its flags, or use format: chat.",
            )
        bare = [one._replace(train=None, marks=()) for one in prompt]
        return with_system(bare, system, self.options.default_system, drop=self._drops)

    @property
    def _drops(self) -> bool:
        return self.options.drop_system

    def _said(self, answer: Side) -> list[Said]:
        """The messages of an answer."""
        form = self._answer_format
        if isinstance(answer, str):
            return [Said({"role": "assistant", "content": self._answer_text(answer)}, None, ())]
        if form is not None:
            raise _for_texts("answer_format", answer)
        return answer

    @property
    def _answer_format(self) -> str | None:
        return self.options.answer_format if isinstance(self.options, AnswerOptions) else None

    def _text(self, row: SourceRow, prompt: Side) -> str:
        """A prompt without the chat template; what would be lost without it is an error."""
        if not isinstance(prompt, str):
            raise _needs_template(f"the prompt is a list of {len(prompt)} messages")
        in_text = "{system}" in (self.options.prompt_format or "")
        for name in ("tools", "template_kwargs", *(() if in_text else ("system",))):
            if row.get(self.fields[name]):
                raise _needs_template(f"the row has {shown(row[self.fields[name]])} in '{self.fields[name]}'")
        return self._filled(row, prompt)

    def _filled(self, row: SourceRow, prompt: str) -> str:
        form = self.options.prompt_format
        if form is None:
            return prompt
        system = row.get(self.fields["system"]) or self.options.default_system or ""
        if self._drops:
            system = ""
        return _filled(form, {"prompt": prompt, "system": str(system)})

    def _answer_text(self, answer: Side) -> str:
        if not isinstance(answer, str):
            raise _needs_template(f"an answer is a list of {len(answer)} messages")
        return _filled(self._answer_format or "{answer}", {"answer": answer})


def _filled(form: str, values: Mapping[str, str]) -> str:
    """A form with its blanks filled in; braces in what the rows hold are text."""
    return BLANK.sub(lambda match: values[match[1]], form)


def _is_trained(one: Said) -> bool:
    spoken = one.message["role"] == "assistant"
    if one.train and not spoken:
        raise DataError(
            f"a message of an answer ({one.message['role']}) asks to be trained",
            "Of an answer only what the assistant says is.",
            "Remove its train or weight flag.",
        )
    return spoken if one.train is None else one.train


def _messages_in(text: str, role: str) -> Any:
    """The messages of a JSON string, as in CSV files; None for any other text."""
    if not text.lstrip().startswith(("[", "{")) or f'"{role}"' not in text:
        return None
    try:
        value = parsed(text, "")
    except DataError:
        return None
    listed = [value] if isinstance(value, Mapping) else value
    return listed if all(isinstance(one, Mapping) and role in one for one in listed) else None


def _for_texts(option: str, messages: Sequence[Said]) -> DataError:
    return DataError(
        f"{option} is set, but the row holds {len(messages)} messages",
        "Only texts are put into a format.",
        f"Remove {option} from the entry's options.",
    )


def _needs_template(what: str) -> DataError:
    return DataError(
        what,
        "Plain text (chat_template: false) has no place for it.",
        "Remove chat_template: false from the entry's options, write {system} into prompt_format, or name no such "
        'field, for instance fields: {system: ""}.',
    )
