"""The page's table of completions: what a policy was asked, what it said, and what that was worth."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pegbox_report.completions import EACH, Completion
from pegbox_report.html import table
from pegbox_report.units import number

HEAD = ("After", "Prompt", "Completion", "#Rewards", "#Advantage")


def answers(completions: Sequence[Completion]) -> tuple[str, str, str] | None:
    """Id, title and content of the section; None where nothing was written."""
    if not completions:
        return None
    note = f"<small>the {EACH} best and the {EACH} worst of some generations, of those in completions.jsonl</small>"
    tools = (
        '<div class="tools"><input id="search" type="search" placeholder="Find in prompts and completions"'
        ' aria-label="Find in completions"></div>'
    )
    found = f'<div class="card" id="answers">{table(HEAD, map(_row, completions))}</div>'
    return "completions", "Completions", f"<h2>Completions{note}</h2>{tools}{found}"


def _row(one: Completion) -> str:
    held_out = "<br><span class=dim>held-out</span>" if one.split == "eval" else ""
    cut = "" if one.finished else " <span class=dim>[cut]</span>"
    rewards = "<br>".join(f"{escape(name)} {number(value)}" for name, value in one.rewards.items())
    total = f"<b>{number(one.reward)}</b>"
    return (
        f"<tr><td>step {one.step:,}{held_out}</td>"
        f'<td><div class="texts">{escape(one.prompt)}</div></td>'
        f'<td><div class="texts">{escape(one.text)}{cut}</div></td>'
        f"<td class=number>{total}<br><small class=dim>{rewards}</small></td>"
        f"<td class=number>{number(one.advantage)}</td></tr>"
    )
