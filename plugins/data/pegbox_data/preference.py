"""The format `preference`: a prompt and two answers to it, one that is wanted and one that is not.

The prompt stands apart, or at the beginning of both answers; either may be texts or lists of messages. A row becomes
one example of two documents, prompt and chosen, then prompt and rejected, which nothing separates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pegbox.errors import ConfigError, DataError
from pegbox.section import setting

from pegbox_data.answering import ANSWER_FIELDS, Answering, AnswerOptions, Side
from pegbox_data.formats import Answers, column
from pegbox_data.layouts import PAIRS, Columns, PairLayout, best_and_worst, columns_of
from pegbox_data.turns import common

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow
    from pegbox_data.messages import Said

CHOSEN, REJECTED = 1, -1
PAIR_FIELDS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "answers": "answers"}


class PreferenceOptions(AnswerOptions):
    """Options of the format `preference`."""

    layout: PairLayout | None = setting(
        None,
        "Columns of well-known datasets: `argilla` (prompt, input, question or instruction; chosen_response), "
        "`argilla_chat` and `ultra` (answers that hold the conversation), `icr` (input), `intel` (question), "
        "`prompt_pairs`, `nectar` (ranked answers).",
    )


class Pair(NamedTuple):
    """A prompt and its two answers, prompt and answers no longer in one."""

    prompt: Side
    chosen: Side
    rejected: Side


class PairReader:
    """Reads the three sides of rows of one entry.

    Args:
        defaults: the columns of a format unless the config names others.
    """

    def __init__(
        self, fields: Mapping[str, str], answering: Answering, layout: PairLayout | None, defaults: Mapping[str, str]
    ) -> None:
        self._fields, self._answering, self._defaults = fields, answering, defaults
        self._ranked = layout == "nectar"
        if self._ranked and fields["query"]:
            raise ConfigError(
                f"fields.query is '{fields['query']}', and the layout nectar has none",
                "Its prompts are transcripts, which nothing follows as text.",
                "Remove query from the entry's fields.",
            )
        self._layout: Columns = PAIRS[layout] if layout is not None else {}

    def __call__(self, row: SourceRow) -> Pair:
        """Prompt, chosen and rejected of a row.

        Raises:
            DataError: a column is missing, or the prompt cannot be told.
        """
        names = columns_of(row, self._fields, self._defaults, self._layout)
        sides: tuple[Any, Any, Any]
        if self._ranked:
            sides = best_and_worst(row, names)
        else:
            answers = (column(row, names["chosen"], "chosen"), column(row, names["rejected"], "rejected"))
            sides = (self._prompt(row, names["prompt"]), *answers)
        read = self._answering.side
        prompt = read(sides[0], names["prompt"]) if sides[0] is not None else None
        chosen, rejected = read(sides[1], names["chosen"]), read(sides[2], names["rejected"])
        if isinstance(chosen, str) and isinstance(rejected, str):
            return Pair(prompt, chosen, rejected) if prompt is not None else self._of_texts(chosen, rejected)
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise DataError(
                f"'{names['chosen']}' and '{names['rejected']}' are a text and a list of messages",
                "Both answers are of one kind.",
                "Write both as texts, or both as messages.",
            )
        return self._of_messages(prompt, chosen, rejected)

    def _prompt(self, row: SourceRow, name: str) -> Any:
        """The column of the prompt; rows may lack the one that nobody named."""
        if not self._fields["query"] and (not name or (name == self._defaults["prompt"] and row.get(name) is None)):
            return None
        return self._answering.prompt(row, name)

    def _of_texts(self, chosen: str, rejected: str) -> Pair:
        if self._answering.options.chat_template:
            raise DataError(
                "the row has two texts and no prompt",
                "The chat template needs to know where the question ends.",
                "Name the column of the prompt: fields: {prompt: ...}; or take the common beginning of the answers as "
                "plain text: options: {chat_template: false}",
            )
        start = _common_words(chosen, rejected)
        if not start:
            raise DataError(
                "the row has no prompt, and its answers have no common beginning",
                "Without a prompt column the prompt is what both answers begin with.",
                "Name the column of the prompt: fields: {prompt: ...}",
            )
        return Pair(chosen[:start], chosen[start:], rejected[start:])

    def _of_messages(self, prompt: Side | None, chosen: Sequence[Said], rejected: Sequence[Said]) -> Pair:
        if isinstance(prompt, list):
            kept = [_without(prompt, answer) for answer in (chosen, rejected)]
            return Pair(prompt, *kept)
        shared = _shared(chosen, rejected)
        if prompt is None or _asks(chosen[:shared], prompt):
            if not shared:
                raise DataError(
                    "the row has no prompt, and its answers begin with different messages",
                    "Without a prompt column the prompt is what both answers begin with.",
                    "Name the column of the prompt: fields: {prompt: ...}",
                )
            return Pair(list(chosen[:shared]), list(chosen[shared:]), list(rejected[shared:]))
        if chosen[0].message["role"] == rejected[0].message["role"] == "assistant":
            return Pair(prompt, list(chosen), list(rejected))
        raise DataError(
            "the answers hold conversations that do not ask the prompt of the row",
            "The model would be asked one or the other.",
            'If the column of the prompt is to be left aside, say that there is none: fields: {prompt: ""}',
        )


class PreferenceFormat:
    """Rows with a chosen and a rejected answer, and a prompt of their own or in common."""

    fields: ClassVar[Mapping[str, str]] = {**PAIR_FIELDS, **ANSWER_FIELDS}
    options = PreferenceOptions

    def open(self, fields: Mapping[str, str], options: PreferenceOptions, processor: Processor) -> Renderer:
        answering = Answering.of(fields, options, processor)
        read = PairReader(fields, answering, options.layout, self.fields)

        def render(row: SourceRow) -> Answers:
            pair = read(row)
            texts = [answering.with_answer(row, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
            return Answers(texts, (CHOSEN, REJECTED))

        return render


preference = PreferenceFormat()


def _shared(chosen: Sequence[Said], rejected: Sequence[Said]) -> int:
    """How many messages two conversations begin with; each has one more at least."""
    shared, shorter = 0, min(len(chosen), len(rejected))
    while shared < shorter - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _without(prompt: Sequence[Said], answer: Sequence[Said]) -> list[Said]:
    """An answer without the prompt, which some datasets repeat at its beginning."""
    repeated = len(answer) > len(prompt) > 0 and list(answer[: len(prompt)]) == list(prompt)
    return list(answer[len(prompt) :] if repeated else answer)


def _asks(messages: Sequence[Said], prompt: str) -> bool:
    """Whether one of these messages is the user asking this."""
    return any(
        one.message["role"] == "user" and str(one.message.get("content")).strip() == prompt.strip() for one in messages
    )


def _common_words(chosen: str, rejected: str) -> int:
    """How many characters two texts have in common at their beginning, in whole words: the whitespace before the word
    that differs belongs to the answers, as the tokens of most vocabularies begin with it.
    """
    shared = chosen[: common(chosen, rejected)]
    if shared and not shared[-1].isspace():
        shared = shared[: -len(shared.rsplit(None, 1)[-1])]
    return len(shared.rstrip())
