"""What a visit to the doctor found: facts in groups, things worth knowing, and problems."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pegbox.errors import PegboxError


@dataclass(frozen=True)
class Finding:
    """What is wrong, why, and what to type next."""

    what: str
    why: str = ""
    next: str = ""


@dataclass
class Report:
    """Filled by the checks, in order. A problem would stop a run or change what it does; a note would not."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)

    def fact(self, group: str, name: str, value: object) -> None:
        self.facts.setdefault(group, {})[name] = str(value)

    def note(self, what: str, why: str = "", next: str = "") -> None:
        self.notes.append(Finding(what, why, next))

    def problem(self, what: str, why: str = "", next: str = "") -> None:
        found = Finding(what, why, next)
        if found not in self.problems:
            self.problems.append(found)

    def problem_of(self, error: PegboxError) -> None:
        """An error that Pegbox would raise, as a problem."""
        self.problem(error.what, error.why, error.next)

    def to_json(self) -> dict[str, Any]:
        return {"healthy": not self.problems, **asdict(self)}

    def to_text(self) -> str:
        """The report for people: facts, notes, then problems, so that what matters stands last."""
        parts = [_facts(group, facts) for group, facts in self.facts.items()]
        for title, findings in (("Worth knowing", self.notes), ("Problems", self.problems)):
            if findings:
                parts.append("\n".join([title, *(_lines(number, found) for number, found in enumerate(findings, 1))]))
        if not self.problems:
            parts.append("No problems found.")
        return "\n\n".join(parts)


def _facts(group: str, facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join([group, *(f"  {name.ljust(width)}  {value}" for name, value in facts.items())])


def _lines(number: int, found: Finding) -> str:
    text = "\n".join(filter(None, (found.what, found.why, found.next)))
    return f"  {number}. " + text.replace("\n", "\n     ")
