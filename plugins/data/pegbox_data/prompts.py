"""The format `prompts`: questions without answers, for methods that let the model answer and score what it says.

A row becomes the tokens of its prompt, the generation prompt included; none of them is trained. What rewards need to
know of the row stays with it by `data.columns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pegbox.errors import DataError

from pegbox_data.answering import ANSWER_FIELDS, Answering, PromptOptions

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Rendered, Renderer, SourceRow


class PromptsOptions(PromptOptions):
    """Options of the format `prompts`."""


class PromptsFormat:
    """Rows with a prompt: a text, or a list of messages."""

    fields: ClassVar[Mapping[str, str]] = {"prompt": "prompt", **ANSWER_FIELDS}
    options = PromptsOptions

    def open(self, fields: Mapping[str, str], options: PromptsOptions, processor: Processor) -> Renderer:
        answering = Answering.of(fields, options, processor)

        def render(row: SourceRow) -> Rendered:
            prompt = answering.side(answering.prompt(row, fields["prompt"]), fields["prompt"])
            if not prompt:
                raise DataError(f"'{fields['prompt']}' is empty", "There is nothing to answer.", "Remove the row.")
            if not isinstance(prompt, str) and prompt[-1].message["role"] == "assistant":
                raise DataError(
                    f"'{fields['prompt']}' ends with a message of the assistant",
                    "A prompt waits for its answer.",
                    "Remove the last message.",
                )
            return answering.alone(row, prompt)

        return render


prompts = PromptsFormat()
