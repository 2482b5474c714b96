"""Columns of well-known preference datasets, by the names that Axolotl's transforms made common.

A layout says where the sides of a row stand; how they become text is the chat template's. What `fields` of an entry
names itself goes before its layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pegbox.errors import DataError

from pegbox_data.formats import SourceRow, column
from pegbox_data.messages import parsed, shown

PairLayout = Literal["argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra", "nectar"]
LabelLayout = Literal["argilla", "argilla_chat", "intel", "prompt_pairs", "ultra"]
Columns = Mapping[str, tuple[str, ...]]
"""For a field the columns that may hold it, the first that a row has; none: rows have no such column."""
PAIRS: Mapping[PairLayout, Columns] = {
    "argilla": {
        "prompt": ("prompt", "input", "question", "instruction"),
        "chosen": ("chosen", "chosen_response"),
        "rejected": ("rejected", "rejected_response"),
    },
    "argilla_chat": {"prompt": ()},
    "icr": {"prompt": ("input",)},
    "intel": {"prompt": ("question",)},
    "prompt_pairs": {},
    "ultra": {},
    "nectar": {},
}
LABELLED: Mapping[LabelLayout, Columns] = {
    "argilla": {"prompt": ("instruction",)},
    "argilla_chat": {"prompt": ()},
    "intel": {"prompt": ("question",)},
    "prompt_pairs": {},
    "ultra": {},
}
ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def columns_of(
    row: SourceRow, fields: Mapping[str, str], defaults: Mapping[str, str], layout: Columns
) -> Mapping[str, str]:
    """The column of each field in this row; empty: it has none."""
    found = dict(fields)
    for field, candidates in layout.items():
        if fields[field] == defaults[field]:
            found[field] = next((name for name in candidates if name in row), candidates[0] if candidates else "")
    return found


def best_and_worst(row: SourceRow, fields: Mapping[str, str]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a row with ranked answers, as in Nectar: rank 1 is the best.

    Axolotl's transform of this name takes the two answers that are ranked lowest instead.
    """
    name = fields["answers"]
    ranked: Any = parsed(column(row, name, "answers"), name)
    known = isinstance(ranked, list | tuple) and all(
        isinstance(one, Mapping) and isinstance(one.get("rank"), int | float) and isinstance(one.get("answer"), str)
        for one in ranked
    )
    if not known or len({one["rank"] for one in ranked}) < 2:
        raise DataError(
            f"'{name}' is {shown(ranked)}",
            "It must hold at least two answers of different ranks.",
            "Write each as {answer: ..., rank: 1}, or remove the row.",
        )
    ordered = sorted(ranked, key=lambda one: one["rank"])
    prompt = column(row, fields["prompt"], "prompt")
    asked = transcript(prompt, fields) if isinstance(prompt, str) else prompt
    return asked, ordered[0]["answer"], ordered[-1]["answer"]


def transcript(text: str, fields: Mapping[str, str]) -> Any:
    """The messages of a text in which `Human:` and `Assistant:` take turns; any other text as it is."""
    pieces = SPEAKER.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return text
    turns = [(ROLES[name], content.strip()) for name, content in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    return [{fields["role"]: role, fields["content"]: content} for role, content in turns]
