"""What the audit of a row can find: each finding with an id, its cause, and what to do about it.

A finding that stops counts as a bad row, unless `data.allow` names it; then, and for all others, rows are counted
and printed. The table of the plugin's page is made from these records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pegbox.errors import DataError, did_you_mean


class Found(NamedTuple):
    """One finding in one row: its id, and what was seen there."""

    id: str
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """A kind of finding.

    Attributes:
        id: what `data.allow` calls it.
        counted: how a count of it reads: `3 rows ...`.
        cause: why it happens; `fix`: what to change.
        stops: it stops a run unless it is allowed.
        drops: a row with it is of no use, and is left out where it is allowed.
    """

    id: str
    counted: str
    cause: str
    fix: str
    stops: bool = True
    drops: bool = False


STOPS = (
    Finding(
        "no-trained-token",
        "rows without a trained token",
        "What should be trained is empty, is switched off by flags, or lies inside tokens that reach over its border.",
        "Remove the rows, or check their answers, roles and flags.",
        drops=True,
    ),
    Finding(
        "missing-end-of-turn",
        "trained turns without an end-of-turn token",
        "The template puts no special token after an answer, so the model never learns to stop.",
        "Choose a template that ends turns (hf.chat_template), or set train_end_of_turn: none in the format's options.",
    ),
    Finding(
        "doubled-bos",
        "rows that begin with two BOS tokens",
        "The template and the text, or the template and the tokenizer, both write one.",
        "Remove the token from the data, or from the template.",
    ),
    Finding(
        "pad-is-eos-untrained",
        "rows whose end token is not trained because it is also the padding token",
        "Whoever made the labels masked padding by its id, and the end of each answer with it.",
        "Make the labels again with the end tokens kept, or give the tokenizer a padding token of its own.",
    ),
    Finding(
        "vanished-turn",
        "messages that the template leaves out",
        "The template renders nothing of a message: it knows neither its role, nor tool calls, or drops it.",
        "Choose a template that renders it (hf.chat_template), or remove the message.",
    ),
    Finding(
        "vanished-tools",
        "rows whose tools the template leaves out",
        "The template has no place for tools: the model would call what it was never told of.",
        "Choose a template that renders tools (hf.chat_template), or remove the field.",
    ),
    Finding(
        "span-inside-token",
        "rows where borders of trained parts lie inside tokens too often",
        "A token that reaches over a border is not trained, and here more than a tenth of the trained part is lost so.",
        "Put borders between words, or before a space: tokens of most vocabularies begin with theirs.",
    ),
    Finding(
        "unequal-prompts",
        "rows whose two answers do not follow the same prompt",
        "The answers differ from a message on that is not the assistant's, or the template renders their prompts "
        "differently: the questions would be compared, not the answers.",
        "Remove the rows, or correct their prompts.",
    ),
    Finding(
        "truncated-away",
        "rows cut to data.max_length before their first trained token",
        "Their answers begin later than the longest row may be.",
        "Set data.max_length higher, or data.overlong: drop.",
        drops=True,
    ),
)
NOTES = (
    Finding(
        "equal-answers",
        "rows whose two answers are the same",
        "Nobody can prefer one of them.",
        "Nothing: they are left out.",
        stops=False,
        drops=True,
    ),
    Finding(
        "unequal-prompt-tokens",
        "rows whose prompt has other tokens before one answer than before the other",
        "The tokenizer joins characters of the prompt's end and of an answer's beginning.",
        "End prompts before a space, and begin answers with it; or nothing, if there are few.",
        stops=False,
    ),
    Finding(
        "border-token",
        "tokens reach over the border of a trained part and are not trained",
        "The tokenizer joins characters on both sides of a border, often line breaks.",
        "Nothing, unless there are many.",
        stops=False,
    ),
    Finding(
        "empty-answer",
        "trained messages are empty",
        "The data holds answers without text; their end is trained.",
        "Remove them if the model should not learn to say nothing.",
        stops=False,
    ),
    Finding(
        "hidden-reasoning",
        "trained messages whose reasoning the template hides, so it is not trained",
        "Templates of reasoning models show the thinking of the last answer only, as in use.",
        "Train on the last answer of each row (turns: last), or make one row for each answer.",
        stops=False,
    ),
    Finding(
        "rewritten-answer",
        "trained messages are not rendered as written: the template hides or changes part of them",
        "The template edits the text, for instance hides thinking between tags.",
        "Compare with `pegbox data inspect`.",
        stops=False,
    ),
    Finding(
        "rewritten-history",
        "trained messages are rendered differently once others follow them",
        "The template rewrites earlier turns; what it renders is what the model sees, and that is trained.",
        "Nothing, or train on the last answer of each row (turns: last).",
        stops=False,
    ),
    Finding(
        "prompt-differs",
        "trained messages do not begin as the generation prompt asks",
        "The prompt goes on with text, such as an opened thinking tag, that the rendered answer does not have.",
        "Give the answers the reasoning that the model is asked for, or switch it off (template_kwargs).",
        stops=False,
    ),
)
FINDINGS = {finding.id: finding for finding in (*STOPS, *NOTES)}


class FindingError(DataError):
    """A finding that stops; `finding` is its id."""

    def __init__(self, what: str, why: str = "", next: str = "", finding: str = "") -> None:
        super().__init__(what, why, next)
        self.finding = finding

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:  # type: ignore[override]
        return type(self), (self.what, self.why, self.next, self.finding)


def stopping(found: Found) -> FindingError:
    """The error for a finding, with what was seen in the row."""
    finding = FINDINGS[found.id]
    seen = found.detail or finding.counted
    return FindingError(
        f"{seen} ({found.id})",
        finding.cause,
        f"{finding.fix} To let such rows pass: data.allow: [{found.id}]",
        found.id,
    )


def require_known(allowed: Iterable[str]) -> None:
    """Raise `ValueError` for ids of `data.allow` that are none, or that never stop."""
    stops = [finding.id for finding in STOPS]
    for name in allowed:
        if name not in stops:
            known = did_you_mean(name, stops, "Those that stop are:").rstrip("?.")
            raise ValueError(f"there is no finding '{name}' that stops a run. {known}. Correct allow")


def table() -> str:
    """The findings as rows of a Markdown table."""
    head = "| finding | stops | cause | what to do |\n|---|---|---|---|\n"
    return head + "".join(
        f"| `{finding.id}` | {'yes' if finding.stops else 'no'} | {finding.cause} | {finding.fix} |\n"
        for finding in FINDINGS.values()
    )
