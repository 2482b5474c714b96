"""The report: every key and what became of it, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pegbox_convert.conversion import Entry, Status

TITLES = {
    Status.MAPPED: "Mapped",
    Status.DIFFERS: "Mapped, with a difference",
    Status.DEFAULT: "Not in the file: the default differs from ours and is written",
    Status.UNNEEDED: "Nothing to set",
    Status.LATER: "Not supported yet",
    Status.UNKNOWN: "Unknown keys",
}
WIDTH = 44


def to_text(entries: Sequence[Entry], title: str, notes: Sequence[str]) -> str:
    """The report for a terminal: one table for each status, then the counts."""
    lines: list[str] = []
    for status, heading in TITLES.items():
        rows = [_row(entry) for entry in entries if entry.status == status]
        if not rows:
            continue
        widths = [min(max(len(row[column]) for row in rows), WIDTH) for column in range(2)]
        lines.append(f"{heading} ({len(rows)})")
        lines += [f"  {row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  {row[2]}".rstrip() for row in rows]
        lines.append("")
    counts = ", ".join(f"{sum(e.status == status for e in entries)} {status}" for status in TITLES)
    return "\n".join([*lines, f"{title}: {counts}", *notes])


def _row(entry: Entry) -> tuple[str, str, str]:
    ours = ", ".join(entry.ours)
    arrow = f"-> {ours}" if ours else ""
    value = "" if isinstance(entry.value, dict | list) or entry.value is None else str(entry.value)
    shown = f"{entry.key}: {value}" if value else entry.key
    shown = shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 3]}..."
    where = f" ({entry.line})" if entry.line and entry.status in (Status.LATER, Status.UNKNOWN) else ""
    return shown, arrow, f"{entry.note}{where}".strip()


def to_json(entries: Sequence[Entry], title: str, config: dict[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """The report and the config as plain data."""
    keys = [
        {
            "key": entry.key,
            "value": entry.value,
            "status": str(entry.status),
            "ours": list(entry.ours),
            "note": entry.note,
            "line": entry.line,
        }
        for entry in entries
    ]
    return {"from": title, "config": config, "keys": keys, "notes": list(notes)}
