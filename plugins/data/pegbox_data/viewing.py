"""How `pegbox data inspect` shows rows: trained tokens coloured on a terminal, between marks elsewhere, or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import typer

from pegbox_data.findings import FINDINGS
from pegbox_data.pairwise import answers, text

if TYPE_CHECKING:
    from pegbox_data.inspecting import Seen


def shown_rows(rows: Iterable[Seen], as_json: bool) -> bool:
    """Print rows one after the other, then counts; whether one of them would stop a run."""
    stops, read, tokens, trained = 0, 0, 0, 0
    counts: Counter[str] = Counter()
    for row in rows:
        typer.echo(_json(row) if as_json else "\n".join(_lines(row)))
        read, stops = read + 1, stops + row.stops
        tokens, trained = tokens + len(row.ids), trained + row.trained
        counts.update(one.id for one in row.findings)
    if not as_json:
        share = f" ({trained / tokens:.0%})" if tokens else ""
        typer.echo(f"{read} rows, {tokens:,} tokens, {trained:,} of them trained{share}")
        for name, count in counts.most_common():
            finding = FINDINGS[name]
            typer.echo(f"{name}: {count:,} {finding.counted}\n  why: {finding.cause}\n  what to do: {finding.fix}")
        if stops:
            typer.echo(typer.style(f"{stops} of these rows would stop a run.", fg="red"))
    return stops > 0


def _json(row: Seen) -> str:
    made: dict[str, object] = {"row": row.number, "where": row.where}
    if row.ids:
        made |= {"input_ids": row.ids, "labels": row.labels, "tokens": row.tokens}
    if row.signs:
        made |= {"documents": row.documents, "signs": row.signs}
    made |= {"source": row.source, "findings": [_finding(row, one.id, one.detail) for one in row.findings]}
    if row.length:
        made["length"] = row.length
    if row.error is not None:
        made["error"] = {"what": row.error.what, "why": row.error.why, "next": row.error.next}
    return json.dumps(made, ensure_ascii=False, default=str)


def _finding(row: Seen, name: str, detail: str) -> dict[str, object]:
    finding = FINDINGS[name]
    stops = finding.stops and name not in row.allowed
    return {"id": name, "stops": stops, "detail": detail, "cause": finding.cause, "fix": finding.fix}


def _lines(row: Seen) -> Iterator[str]:
    share = f"{len(row.ids):,} tokens, {row.trained:,} trained" if row.ids else "cannot be used"
    if len(row.signs) == 1:
        share = f"{'wanted' if row.signs[0] > 0 else 'not wanted'}, {share}"
    yield typer.style(f"row {row.number}  {row.where}  {share}", bold=True)
    if row.error is not None:
        yield typer.style(str(row.error), fg="red")
    if row.ids:
        yield from answers(row) if len(row.signs) > 1 else [text(row.tokens, row.labels)]
    for name, count in Counter(one.id for one in row.findings).items():
        stops = FINDINGS[name].stops and name not in row.allowed
        detail = next(one.detail for one in row.findings if one.id == name) or FINDINGS[name].counted
        yield typer.style(f"{'stops' if stops else 'note'}: {name} x{count}: {detail}", fg="red" if stops else "yellow")
    if row.length:
        yield typer.style(f"length: {row.length}", fg="yellow")
    yield ""
