"""The format `steps`: a prompt and the steps of an answer, each with a verdict: what process reward models learn from.

The token of the separator behind each step is marked as trained: there a verdict is given. Pieces are tokenized apart,
as in TRL's PRM trainer, so that each separator is a token of its own and the n-th marked token belongs to the n-th
verdict. The verdicts themselves always stay with the row, as its column `labels`: the n-th one belongs to the n-th
trained token, which is why rows are never cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import ConfigError, DataError
from pegbox.section import Section, setting

from pegbox_data.formats import Rendered, Tokens, column
from pegbox_data.messages import parsed, shown

if TYPE_CHECKING:
    from pegbox.types import Processor
    from transformers import PreTrainedTokenizerBase

    from pegbox_data.formats import Renderer, SourceRow


VERDICTS = "labels"
"""The column of an example that holds the verdicts, whatever the file calls it."""


class StepsOptions(Section):
    """Options of the format `steps`."""

    step_separator: str = setting("\n", "Text behind each step; it must be one token.", min_length=1)
    train_on_last_step_only: bool = setting(False, "Mark the last step of each row only.")


class StepsFormat:
    """Rows with a prompt, a list of steps and a list of verdicts, true or false, one for each step."""

    fields: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "completions": "completions", "labels": "labels"}
    options = StepsOptions

    def open(self, fields: Mapping[str, str], options: StepsOptions, processor: Processor) -> Renderer:
        tokenizer = processor.tokenizer
        separator = _ids(tokenizer, options.step_separator)
        if len(separator) != 1:
            raise ConfigError(
                f"step_separator {options.step_separator!r} makes {len(separator)} tokens with this tokenizer",
                "A verdict is given at one token.",
                "Choose a separator that is one token, such as a line break.",
            )
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []

        def render(row: SourceRow) -> Rendered:
            prompt, (steps, verdicts) = column(row, fields["prompt"], "prompt"), _steps(row, fields)
            if not isinstance(prompt, str):
                raise DataError(f"'{fields['prompt']}' is {shown(prompt)}", "It must be a string.", "Write it as text.")
            ids = [*bos, *_ids(tokenizer, prompt)]
            trained = [False] * len(ids)
            for number, step in enumerate(steps, 1):
                piece = _ids(tokenizer, step)
                ids += [*piece, *separator]
                marked = number == len(steps) or not options.train_on_last_step_only
                trained += [*[False] * len(piece), marked]
            given = verdicts[-1:] if options.train_on_last_step_only else verdicts
            return Rendered("", [], tokens=Tokens(ids, trained), columns={VERDICTS: list(given)})

        return render


stepwise = StepsFormat()


def _steps(row: SourceRow, fields: Mapping[str, str]) -> tuple[Sequence[str], Sequence[bool]]:
    """The steps, and the verdicts on them."""
    steps: Any = parsed(column(row, fields["completions"], "completions"), fields["completions"])
    labels: Any = parsed(column(row, fields["labels"], "labels"), fields["labels"])
    if not isinstance(steps, list | tuple) or not steps or not all(isinstance(step, str) for step in steps):
        raise DataError(
            f"'{fields['completions']}' is {shown(steps)}", "It must be a list of texts.", "Write each step as text."
        )
    if (
        not isinstance(labels, list | tuple)
        or len(labels) != len(steps)
        or not all(isinstance(label, bool) for label in labels)
    ):
        raise DataError(
            f"'{fields['labels']}' is {shown(labels)} for {len(steps)} steps",
            "It must hold true or false for each step.",
            "Correct the row.",
        )
    return steps, labels


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
