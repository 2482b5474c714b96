"""The format `unpaired`: a prompt, one answer, and whether it is wanted: what KTO learns from.

A row becomes one document with the sign +1 or -1. Rows with two answers become two such rows, if they are to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError
from pegbox.section import setting
from pydantic import model_validator

from pegbox_data.answering import ANSWER_FIELDS, Answering, AnswerOptions, Side
from pegbox_data.formats import Answers, column
from pegbox_data.layouts import LABELLED, LabelLayout, PairLayout, columns_of
from pegbox_data.messages import shown
from pegbox_data.preference import CHOSEN, PAIR_FIELDS, REJECTED, PairReader

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow
    from pegbox_data.messages import Said

WORDS = {"true": True, "false": False, "1": True, "0": False}
"""Labels as CSV files write them."""


class UnpairedOptions(AnswerOptions):
    """Options of the format `unpaired`."""

    layout: PairLayout | None = setting(
        None,
        "Columns of well-known datasets: `argilla` (instruction), `argilla_chat` (the completion holds the "
        "conversation), `intel` (question), `prompt_pairs`, `ultra`; with `unpair` those of the format `preference`.",
    )
    unpair: bool = setting(False, "Make two rows of each row with a chosen and a rejected answer.")

    @model_validator(mode="after")
    def _is_a_layout_of_its_rows(self) -> UnpairedOptions:
        if self.layout is not None and not self.unpair and self.layout not in LABELLED:
            raise ValueError(
                f"layout is {self.layout}, whose rows have two answers. Those with a label are: {', '.join(LABELLED)}. "
                "Set unpair: true, or another layout"
            )
        return self


class UnpairedFormat:
    """Rows with a completion and a label: true, it is wanted, or false. A completion that is a list of messages may
    hold the prompt too: all up to the last message that is not part of the answer.
    """

    fields: ClassVar[Mapping[str, str]] = {
        **PAIR_FIELDS,
        "completion": "completion",
        "label": "label",
        **ANSWER_FIELDS,
    }
    options = UnpairedOptions

    def open(self, fields: Mapping[str, str], options: UnpairedOptions, processor: Processor) -> Renderer:
        answering = Answering.of(fields, options, processor)
        if options.unpair:
            pairs = PairReader(fields, answering, options.layout, self.fields)

            def both(row: SourceRow) -> Answers:
                pair = pairs(row)
                texts = [answering.with_answer(row, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
                return Answers(texts, (CHOSEN, REJECTED), apart=True)

            return both

        layout: LabelLayout | None = options.layout  # type: ignore[assignment]
        columns = LABELLED[layout] if layout is not None else {}

        def one(row: SourceRow) -> Answers:
            names = columns_of(row, fields, self.fields, columns)
            sign = CHOSEN if _label(row, names["label"]) else REJECTED
            prompt, answer = _sides(row, names, self.fields["prompt"], answering)
            return Answers([answering.with_answer(row, prompt, answer)], (sign,))

        return one


unpaired = UnpairedFormat()


def _sides(row: SourceRow, names: Mapping[str, str], default: str, answering: Answering) -> tuple[Side, Side]:
    """Prompt and answer of a row."""
    answer = answering.side(column(row, names["completion"], "completion"), names["completion"])
    name = names["prompt"]
    if answering.fields["query"] or (name and not (name == default and row.get(name) is None)):
        return answering.side(answering.prompt(row, name), name), answer
    if isinstance(answer, str):
        raise DataError("the row has no prompt", "A completion follows one.", "Name its column: fields: {prompt: ...}")
    asked = _asked(answer)
    return list(answer[:asked]), list(answer[asked:])


def _asked(said: Sequence[Said]) -> int:
    """How many messages come before the answer: all up to the last one of the user."""
    asked = [index for index, one in enumerate(said) if one.message["role"] == "user"]
    if not asked or asked[-1] + 1 == len(said):
        raise DataError(
            f"the completion holds messages of {', '.join(str(one.message['role']) for one in said)}",
            "Without a prompt of its own the row must hold a question and an answer to it.",
            "Name the column of the prompt: fields: {prompt: ...}, or correct the row.",
        )
    return asked[-1] + 1


def _label(row: SourceRow, name: str) -> bool:
    value: Any = column(row, name, "label")
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    if value not in (True, False) or isinstance(value, float):
        raise DataError(
            f"'{name}' is {shown(value)}",
            "A label is true (the answer is wanted) or false.",
            f"Write {name} as true or false.",
        )
    return bool(value)
