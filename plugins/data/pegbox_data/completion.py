"""The format `completion`: a prompt and what follows it, trained on what follows.

Through the chat template the pair is one question and one answer. Without it the two are joined as they
stand, after the tokenizer's own BOS and before EOS, which is trained too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError
from pegbox.section import Section, setting
from pydantic import JsonValue

from pegbox_data.conversation import Conversation, Wanted
from pegbox_data.findings import Found
from pegbox_data.formats import Rendered, Span, column
from pegbox_data.messages import shown
from pegbox_data.template import Talk

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow


class CompletionOptions(Section):
    """Options of the format `completion`."""

    chat_template: bool = setting(True, "Render the pair as question and answer; false joins the two as plain text.")
    train_on_inputs: bool = setting(False, "Train the prompt too.")
    template_kwargs: dict[str, JsonValue] = setting(
        {}, "Variables for the chat template, such as `{enable_thinking: false}`."
    )


class CompletionFormat:
    """Rows with a prompt and a completion.

    For plain text, `fields: {prompt: ""}` says that the rows have no prompt.
    """

    fields: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "completion": "completion"}
    options = CompletionOptions

    def open(self, fields: Mapping[str, str], options: CompletionOptions, processor: Processor) -> Renderer:
        def pair(row: SourceRow) -> tuple[str, str]:
            prompt = _text(row, fields["prompt"], "prompt") if fields["prompt"] else ""
            return prompt, _text(row, fields["completion"], "completion")

        def plain(row: SourceRow) -> Rendered:
            prompt, completion = pair(row)
            text = prompt + completion
            notes = () if completion else (Found("empty-answer"),)
            start = 0 if options.train_on_inputs else len(prompt)
            return Rendered(text, [Span(start, len(text), len(text))], bos=True, eos=True, notes=notes)

        if not options.chat_template:
            return plain
        conversation = Conversation.of(processor, options.template_kwargs)

        def templated(row: SourceRow) -> Rendered:
            prompt, completion = pair(row)
            question, answer = (
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            )
            return conversation.render(Talk([question, answer]), Wanted([1], inputs=options.train_on_inputs))

        return templated


completion = CompletionFormat()


def _text(row: SourceRow, name: str, canonical: str) -> str:
    value: Any = column(row, name, canonical)
    if not isinstance(value, str):
        raise DataError(f"'{name}' is {shown(value)}", "It must be a string.", f"Write {name} as text.")
    return value
