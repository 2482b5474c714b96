"""The curves of a run: which figures are drawn together, under which title, in which unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pegbox_report.panels import NO_LIKELIHOOD, Panel, panels_of

MOST_POINTS = 3000
"""Of one series on the page; of longer ones every n-th is drawn."""
FEW = 60
TITLES = {
    "grad_norm": ("Gradient norm", "before clipping", ""),
    "learning_rate": ("Learning rate", "of the first group", ""),
    "tokens_per_s": ("Tokens per second", "all processes", ""),
    "tokens_per_step": ("Tokens per step", "all processes", ""),
    "peak_memory_bytes": ("Memory", "peak on the first device", "bytes"),
    "loss_scale": ("Loss scale", "fp16", ""),
}
EXACT = ("learning_rate", "peak_memory_bytes", "loss_scale")
"""Figures without noise: smoothing would only delay them."""
SHOWN_ELSEWHERE = ("kind", "step", "elapsed_s", "trained_tokens", "epoch", "loss")
COLORS = ("one", "two", "three")
Rows = Sequence[Mapping[str, Any]]


def page_data(metrics: Rows) -> dict[str, Any]:
    """What the page draws, as plain data."""
    train = _thin([row for row in metrics if row.get("kind") == "train"])
    held_out = _thin([row for row in metrics if row.get("kind") == "eval"])
    _fill_time(train, held_out)
    keys = _keys(train)
    every = list(dict.fromkeys([*keys, *(key.removeprefix("eval_") for key in _keys(held_out))]))
    charts = []
    if any("loss" in row for row in (*train, *held_out)) or any("eval_loss" in row for row in held_out):
        pair = [_series("train", train, "loss"), _series("held-out", held_out, "eval_loss", "two", held_out=True)]
        note = "" if set(every) & set(NO_LIKELIHOOD) else "nats per trained token"
        charts.append(_chart("Loss", note, "", pair, wide=True))
    panels = list(panels_of(every))
    charts += [_panel_chart(panel, train, held_out) for panel in panels]
    drawn = {key for panel in panels for _, key in panel.figures}
    left = [key for key in keys if key not in drawn]
    for key in (*(key for key in TITLES if key in left), *(key for key in left if key not in TITLES)):
        title, note, unit = TITLES.get(key, (key, "", ""))
        pair = [_series("train", train, key), _series("held-out", held_out, f"eval_{key}", "two", held_out=True)]
        made = _chart(title, note, unit, pair, zero=key in ("tokens_per_s", "peak_memory_bytes"))
        charts.append({**made, "exact": key in EXACT, "group": "Training" if panels else ""})
    for key in _keys(held_out):
        if key != "eval_loss" and key.removeprefix("eval_") not in (*keys, *drawn):
            made = _chart(key, "", "", [_series("held-out", held_out, key, "two", held_out=True)])
            charts.append({**made, "group": "Training" if panels else ""})
    return {"charts": [chart for chart in charts if chart["series"]], "smooth": 0.8 if len(train) > FEW else 0}


def _panel_chart(panel: Panel, train: Rows, held_out: Rows) -> dict[str, Any]:
    """Figures in colours of their own; held-out ones are dashed, or in the second colour where there is one figure."""
    several = len(panel.figures) > 1
    series = []
    for (label, key), color in zip(panel.figures, COLORS, strict=False):
        other = (f"{label}, held-out", color) if several else ("held-out", "two")
        series.append(_series(label, train, key, color))
        series.append(_series(other[0], held_out, f"eval_{key}", other[1], held_out=True, dashed=several))
    made = _chart(panel.title, panel.note, panel.unit, series, zero=panel.zero)
    return {**made, "group": panel.group}


def _thin(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    every = max(1, -(-len(rows) // MOST_POINTS))
    kept = rows[::every]
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return [dict(row) for row in kept]


def _fill_time(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """An evaluation's time is that of the last step that was logged before it."""
    for row in held_out:
        before = [other["elapsed_s"] for other in train if other["step"] <= row["step"] and "elapsed_s" in other]
        row["elapsed_s"] = before[-1] if before else 0.0


def _keys(rows: Rows) -> list[str]:
    found = dict.fromkeys(key for row in rows for key in row)
    return [key for key in found if key not in SHOWN_ELSEWHERE]


def _series(
    label: str, rows: Rows, key: str, color: str = "one", *, held_out: bool = False, dashed: bool = False
) -> dict[str, Any]:
    having = [row for row in rows if key in row]
    return {
        "label": label,
        "color": color,
        "held_out": held_out,
        "dashed": dashed,
        "step": [row["step"] for row in having],
        "time": [row.get("elapsed_s", 0.0) for row in having],
        "value": [row[key] for row in having],
    }


def _chart(
    title: str, note: str, unit: str, series: list[dict[str, Any]], *, wide: bool = False, zero: bool = False
) -> dict[str, Any]:
    drawn = [one for one in series if any(value is not None for value in one["value"])]
    return {"title": title, "note": note, "unit": unit, "series": drawn, "wide": wide, "zero": zero}
