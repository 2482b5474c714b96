"""The page: one HTML file with its style, script and figures inside; it asks the network for nothing.

Everything that comes from the run is escaped: text by `html.escape`, figures as JSON in which no `<` is left, so that
neither a prompt nor a name can end the element that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any

from pegbox_report.answers import answers
from pegbox_report.health import Finding
from pegbox_report.html import card, table, text
from pegbox_report.run_files import RunFiles
from pegbox_report.series import page_data
from pegbox_report.units import number, seconds, size

LEVELS = {"problem": "Problem", "warning": "Warning", "note": "Note"}
MOST_SAMPLES = 12
STATUS = {
    "finished": "finished",
    "stopped": "stopped early",
    "interrupted": "interrupted",
    "unfinished": "not finished",
}


def render(run: RunFiles, findings: Sequence[Finding]) -> str:
    """The whole page."""
    data = page_data(run.metrics)
    parts = [
        _health(findings),
        _curves(bool(data["charts"])),
        answers(run.completions),
        _samples(run),
        _plan(run),
        _config(run),
        _origin(run),
        _checkpoints(run),
    ]
    sections = [(name, title) for name, title, _ in filter(None, parts)]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in sections)
    body = "".join(f'<section id="{name}">{content}</section>' for name, _, content in filter(None, parts))
    name = escape(run.folder.name)
    figures = embedded(data)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · Pegbox</title><style>{_file('page.css')}</style></head><body>"
        f'<div class="bar"><div><b>{name}</b><nav>{links}</nav><button id="theme">Dark</button></div></div>'
        f"<main>{_header(run)}{body}<footer>Made by pegbox report on {_when(datetime.now(UTC))}."
        " Everything is inside this file.</footer></main>"
        f'<script type="application/json" id="figures">{figures}</script><script>{_file("page.js")}</script>'
        "</body></html>\n"
    )


def embedded(data: object) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _file(name: str) -> str:
    return files("pegbox_report").joinpath(name).read_text(encoding="utf-8")


def _when(moment: datetime | str | None) -> str:
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return moment.strftime("%-d %B %Y, %H:%M UTC") if moment else "–"


def _header(run: RunFiles) -> str:
    record, plan = run.record, run.record.get("plan", {})
    config = {entry["key"]: entry["value"] for entry in plan.get("config", ())}
    status = escape(run.status)
    ended = f", ended {_when(record['ended'])}" if record.get("ended") else ""
    processes = record.get("world_size", 1)
    where = f" on {processes} processes" if processes != 1 else ""
    label = f'<span class="status {status}">{STATUS.get(status, status)}</span>'
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in _figures(run)
    )
    return (
        f"<header><h1>{escape(run.folder.name)}{label}</h1>"
        f"<p>{escape(str(config.get('model.name', '')))}{where} · started {_when(record.get('started'))}{ended}"
        f'</p></header><dl class="figures">{figures}</dl>'
    )


def _figures(run: RunFiles) -> Iterable[tuple[str, str, str]]:
    train = [row for row in run.metrics if row.get("kind") == "train"]
    last = train[-1] if train else {}
    losses = [(row["eval_loss"], row["step"]) for row in run.metrics if row.get("eval_loss") is not None]
    yield "Steps", number(last.get("step")), f"{number(last['epoch'])} epochs" if "epoch" in last else ""
    first = next((row["loss"] for row in train if row.get("loss") is not None), None)
    yield "Loss", number(last.get("loss")), f"from {number(first)}" if first is not None else ""
    for title, key in (("Reward", "reward"), ("Accuracy", "rewards/accuracies")):
        means = [row[key] for row in train if row.get(key) is not None]
        if means:
            yield title, number(means[-1]), f"from {number(means[0])}"
    if losses:
        best, at = min(losses)
        yield "Held-out loss", number(losses[-1][0]), f"best {number(best)} at {at}"
    yield "Trained tokens", number(last.get("trained_tokens")), ""
    speeds = sorted(row["tokens_per_s"] for row in train if row.get("tokens_per_s"))
    yield "Speed", number(speeds[len(speeds) // 2] if speeds else None), "tokens/s, median"
    peaks = [row["peak_memory_bytes"] for row in train if row.get("peak_memory_bytes")]
    if peaks:
        yield "Memory", size(max(peaks)), "peak, first device"
    yield "Time", seconds(last.get("elapsed_s")), "of training"


def _health(findings: Sequence[Finding]) -> tuple[str, str, str]:
    raised = sorted((one for one in findings if one.raised), key=lambda one: list(LEVELS).index(one.level))
    shown = [
        f'<li class="{one.level}"><span class="level">{LEVELS[one.level]}</span>'
        f"<div><p>{escape(_sentence(one.says))} <small class=dim>{one.where}</small></p>"
        f"<p>{escape(one.rule.advice)}</p></div></li>"
        for one in raised
    ]
    holding = [one for one in findings if not one.raised and one.value is not None]
    if not shown:
        text = f"All {len(holding)} rules that apply hold." if holding else "Too few figures to say anything yet."
        shown = [f'<li class="well"><span class="level">Healthy</span><div><p>{text}</p></div></li>']
    rows = (
        f"<tr><td><code>{escape(one.rule.name)}</code></td>"
        f"<td>{escape(one.rule.metric)}, {escape(one.rule.measure)}</td>"
        f"<td class=number>{_value(one)}</td><td class=number>{_limits(one)}</td></tr>"
        for one in findings
    )
    rules = table(("Rule", "Looks at", "#Value", "#Usual"), rows)
    more = f"<details><summary>All {len(findings)} rules</summary><div class=card>{rules}</div></details>"
    return "health", "Health", f"<h2>Health</h2><ul class=findings>{''.join(shown)}</ul>{more}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _value(finding: Finding) -> str:
    return "–" if finding.value is None else number(finding.value)


def _limits(finding: Finding) -> str:
    rule = finding.rule
    if rule.above is not None and rule.below is not None:
        return f"{number(rule.below)} to {number(rule.above)}"
    return f"≤ {number(rule.above)}" if rule.above is not None else f"≥ {number(rule.below)}"


def _curves(any_drawn: bool) -> tuple[str, str, str]:
    tools = (
        '<div class="tools"><label>Smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02">'
        '<output id="smooth-value"></output></label><button id="log" aria-pressed="false">Logarithmic</button>'
        '<button id="time" aria-pressed="false">Over time</button></div>'
    )
    empty = "" if any_drawn else '<div class="card empty">Nothing was logged yet.</div>'
    return "curves", "Curves", f'<h2>Curves</h2>{tools}<div class="charts" id="charts"></div>{empty}'


def _samples(run: RunFiles) -> tuple[str, str, str] | None:
    if not run.samples:
        return None
    by_prompt: dict[str, list[tuple[Any, str]]] = {}
    for row in run.samples:
        by_prompt.setdefault(text(row.get("prompt")), []).append((row.get("step"), text(row.get("completion"))))
    cards = []
    for prompt, written in list(by_prompt.items())[:MOST_SAMPLES]:
        lines = "".join(
            f'<div class="step">step {escape(str(step))}</div><pre>{escape(answer)}</pre>' for step, answer in written
        )
        cards.append(
            f'<div class="card sample"><p class="prompt">{escape(prompt)}</p><div class="answers">{lines}</div></div>'
        )
    left = len(by_prompt) - MOST_SAMPLES
    more = f"<p class=dim>{left} more prompts are in samples/.</p>" if left > 0 else ""
    note = "<small>what the model wrote during training</small>"
    return "samples", "Samples", f"<h2>Samples{note}</h2>{''.join(cards)}{more}"


def _plan(run: RunFiles) -> tuple[str, str, str]:
    plan = run.record.get("plan", {})
    rows = (
        f"<tr><td><code>{escape(job['hook'])}</code></td><td>{escape(', '.join(job['plugins']))}</td>"
        f"<td>{escape(', '.join(job['wrappers'])) or '<span class=dim>–</span>'}</td>"
        f"<td class=dim>{escape(job['reason'])}</td></tr>"
        for job in plan.get("hooks", ())
    )
    jobs = f'<div class="card">{table(("Hook", "Done by", "Refined by", "Why"), rows)}</div>'
    plugins = " → ".join(f"<code>{escape(part['name'])}</code>" for part in plan.get("plugins", ()))
    return "plan", "Plan", f"<h2>Plan<small>who does what</small></h2><p>{plugins}</p>{jobs}"


def _config(run: RunFiles) -> tuple[str, str, str]:
    entries = run.record.get("plan", {}).get("config", ())
    rows = []
    for entry in entries:
        origin = str(entry["from"])
        value = escape(json.dumps(entry["value"], ensure_ascii=False))
        name = "default" if origin == "default" else "set"
        rows.append(
            f'<tr data-origin="{name}"><td><code>{escape(entry["key"])}</code></td><td><code>{value}</code></td>'
            f'<td class="{"dim" if name == "default" else "set"}">{escape(origin)}</td></tr>'
        )
    count = sum('data-origin="set"' in row for row in rows)
    tools = (
        '<div class="tools"><input id="filter" type="search" placeholder="Find a key or value" aria-label="Find">'
        f'<button id="chosen" aria-pressed="false">Only the {count} that were set</button></div>'
    )
    keys = f'<div class="card" id="keys">{table(("Key", "Value", "From"), rows)}</div>'
    return "config", "Config", f"<h2>Config<small>every key, and where it came from</small></h2>{tools}{keys}"


def _origin(run: RunFiles) -> tuple[str, str, str]:
    record = run.record
    data = [
        f"<tr><td>{escape(name)}</td><td class=number>{_count(part.get('rows'))}</td>"
        f"<td><code>{escape(str(part.get('fingerprint')))}</code></td></tr>"
        for name, part in record.get("data", {}).items()
    ]
    data.append(f"<tr><td>processor</td><td></td><td><code>{escape(str(record.get('processor')))}</code></td></tr>")
    data.append(f"<tr><td>plan</td><td></td><td><code>{escape(str(record.get('digest')))}</code></td></tr>")
    versions = [
        f"<tr><td>{escape(name)}</td><td><code>{escape(text)}</code></td></tr>"
        for name, text in record.get("versions", {}).items()
    ]
    command = " ".join(map(str, record.get("command", ())))
    left = card("Data", table(("Split", "#Rows", "Fingerprint"), data))
    right = card("Versions", table(("Package", "Version"), versions))
    content = f'<h2>Origin</h2><p class="mono dim">{escape(command)}</p><div class="twin">{left}{right}</div>'
    return "origin", "Origin", content


def _count(rows: object) -> str:
    return f"{rows:,}" if isinstance(rows, int) else "streamed"


def _checkpoints(run: RunFiles) -> tuple[str, str, str] | None:
    if not run.checkpoints and not run.merges:
        return None
    parts = []
    if run.checkpoints:
        rows = (
            f"<tr><td><code>{escape(one.name)}</code></td><td class=number>{size(one.size)}</td>"
            f"<td>{_when(one.saved)}</td></tr>"
            for one in run.checkpoints
        )
        parts.append(card("Checkpoints", table(("Folder", "#Size", "Saved"), rows)))
    if run.merges:
        rows = (
            f"<tr><td><code>{escape(name)}</code></td><td>{escape(str(record.get('status')))}</td>"
            f"<td>{escape(str(record.get('dtype')))}</td><td class=number>{_divergence(record)}</td></tr>"
            for name, record in run.merges.items()
        )
        parts.append(card("Merged models", table(("Folder", "Check", "Data type", "#Divergence"), rows)))
    return "checkpoints", "Checkpoints", f'<h2>Checkpoints</h2><div class="twin">{"".join(parts)}</div>'


def _divergence(record: Any) -> str:
    value = (record.get("check") or {}).get("kl")
    return "–" if value is None else f"{number(value)} nats"
