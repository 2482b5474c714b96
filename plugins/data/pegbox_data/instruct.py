"""The format `alpaca`: an instruction, perhaps an input for it and a system message, and the output that is trained.

As a conversation through the chat template, or as plain text of a prompt that the config writes. The default prompt is
the one that Stanford Alpaca was trained with (https://github.com/tatsu-lab/stanford_alpaca).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError
from pegbox.section import Section, setting
from pydantic import JsonValue, field_validator

from pegbox_data.conversation import Conversation, Wanted
from pegbox_data.findings import Found
from pegbox_data.formats import Rendered, Span, column
from pegbox_data.messages import shown
from pegbox_data.template import Talk

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow

NAMES = ("system", "instruction", "input")
BLANK = re.compile(r"\{(\w+)\}")
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


class AlpacaOptions(Section):
    """Options of the format `alpaca`."""

    chat_template: bool = setting(False, "Render question and answer with the chat template instead of `prompt`.")
    prompt: str = setting(
        "{system}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Text before the output of rows with an input; `{system}`, `{instruction}` and `{input}` are filled in.",
    )
    prompt_no_input: str = setting(
        "{system}\n\n### Instruction:\n{instruction}\n\n### Response:\n", "The same for rows without an input."
    )
    system: str | None = setting(
        None, "System message of rows that have none; for plain text Stanford Alpaca's sentence if not set."
    )
    question: str = setting("{instruction}\n\n{input}", "The user's message of rows with an input, with chat_template.")
    train_on_inputs: bool = setting(False, "Train the prompt too.")
    template_kwargs: dict[str, JsonValue] = setting({}, "Variables for the chat template.")

    @field_validator("prompt", "prompt_no_input", "question")
    @classmethod
    def _knows_its_names(cls, text: str) -> str:
        unknown = [name for name in BLANK.findall(text) if name not in NAMES]
        if unknown:
            raise ValueError(
                f"there is nothing to fill in for {{{unknown[0]}}}. Rows have system, instruction and input. Correct it"
            )
        return text


class AlpacaFormat:
    """Rows with an instruction and an output; `input` and `system` may be missing or empty."""

    fields: ClassVar[Mapping[str, str]] = {
        "instruction": "instruction",
        "input": "input",
        "output": "output",
        "system": "system",
    }
    options = AlpacaOptions

    def open(self, fields: Mapping[str, str], options: AlpacaOptions, processor: Processor) -> Renderer:
        def plain(row: SourceRow) -> Rendered:
            values, output = _values(row, fields), _text(row, fields["output"], "output")
            form = options.prompt if values["input"] else options.prompt_no_input
            values["system"] = values["system"] or options.system or (WITH_INPUT if values["input"] else WITHOUT_INPUT)
            prompt = _filled(form, values)
            text = prompt + output
            start = 0 if options.train_on_inputs else len(prompt)
            notes = () if output else (Found("empty-answer"),)
            return Rendered(text, [Span(start, len(text), len(text))], bos=True, eos=True, notes=notes)

        if not options.chat_template:
            return plain
        conversation = Conversation.of(processor, options.template_kwargs)

        def templated(row: SourceRow) -> Rendered:
            values, output = _values(row, fields), _text(row, fields["output"], "output")
            question = _filled(options.question, values) if values["input"] else values["instruction"]
            system = values["system"] or options.system
            messages = [
                *([{"role": "system", "content": system}] if system else []),
                {"role": "user", "content": question},
                {"role": "assistant", "content": output},
            ]
            return conversation.render(Talk(messages), Wanted([len(messages) - 1], inputs=options.train_on_inputs))

        return templated


alpaca = AlpacaFormat()


def _values(row: SourceRow, fields: Mapping[str, str]) -> dict[str, str]:
    found = {"instruction": _text(row, fields["instruction"], "instruction")}
    for name in ("input", "system"):
        value: Any = row.get(fields[name])
        if value is not None and not isinstance(value, str):
            raise DataError(f"'{fields[name]}' is {shown(value)}", "It must be a string.", f"Write {name} as text.")
        found[name] = value or ""
    return found


def _filled(form: str, values: Mapping[str, str]) -> str:
    """A form with its blanks filled in; braces in what the rows hold are text."""
    return BLANK.sub(lambda match: values[match[1]], form)


def _text(row: SourceRow, name: str, canonical: str) -> str:
    value: Any = column(row, name, canonical)
    if not isinstance(value, str):
        raise DataError(f"'{name}' is {shown(value)}", "It must be a string.", f"Write {name} as text.")
    return value
