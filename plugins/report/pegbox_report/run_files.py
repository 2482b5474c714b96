"""What a run left in its folder: its record, figures, samples, checkpoints, and what became of its merge.

Everything but `run.json` may be missing: a run that still trains, or was killed, is read as far as it got.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pegbox.errors import PegboxError, UserError
from pegbox.folder import RECORD
from pegbox.plan import compose

from pegbox_report.completions import Completion, read_completions, weights_of
from pegbox_report.health import Rule, rule_of
from pegbox_report.rules import BUILT_IN

log = logging.getLogger("pegbox")
METRICS, SAMPLES, COMPLETIONS = "metrics.jsonl", "samples", "completions.jsonl"
CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"


@dataclass(frozen=True)
class CheckpointFile:
    """A saved checkpoint."""

    name: str
    size: int
    saved: datetime


@dataclass(frozen=True)
class RunFiles:
    """One run.

    Attributes:
        record: `run.json`.
        metrics: records of `metrics.jsonl`, in order; a last line that is cut off is left out.
        samples: rows of `samples/*.jsonl`: step, prompt, completion.
        completions: of an online run, the best and the worst of some generations.
        merges: `merge.json` of merged models inside the run's folder, by folder.
    """

    folder: Path
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    completions: Sequence[Completion]
    checkpoints: Sequence[CheckpointFile]
    merges: Mapping[str, Mapping[str, Any]]

    @property
    def status(self) -> str:
        """`finished`, `stopped`, `interrupted`, or `unfinished`: still training, killed, or failed."""
        outcome = self.record.get("outcome")
        return str(outcome["reason"]) if outcome else "unfinished"


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        UserError: the folder holds no run.
    """
    folder = folder.expanduser().resolve()
    file = folder / RECORD
    if not file.is_file():
        raise UserError(
            f"{folder} holds no run" if folder.is_dir() else f"there is no folder {folder}",
            f"A run's folder holds {RECORD}.",
            "Name a run's folder, as `output` in its config.",
        )
    record = _json(file)
    merges = {path.parent.name: _json(path) for path in sorted(folder.glob("*/merge.json"))}
    samples = [row for path in sorted((folder / SAMPLES).glob("*.jsonl")) for row in _rows(path)]
    return RunFiles(
        folder=folder,
        record=record,
        metrics=_rows(folder / METRICS),
        samples=sorted(samples, key=lambda row: row.get("step", 0)),
        completions=read_completions(folder / COMPLETIONS, weights_of(record)),
        checkpoints=_checkpoints(folder / CHECKPOINTS),
        merges=merges,
    )


def rules_of(run: RunFiles) -> list[Rule]:
    """The built-in rules, and those that the run's plugins declare as items of kind `health_rule`.

    A run whose plugins are not installed here is judged by the built-in rules alone.
    """
    active = {part["name"] for part in run.record.get("plan", {}).get("plugins", ())}
    config = run.folder / CONFIG
    declared: list[Rule] = []
    if config.is_file():
        try:
            ctx = compose(config)
            declared = [rule_of(name, item.target) for name, item in ctx.items("health_rule").items()]
        except PegboxError as error:
            log.warning("report: the rules of the run's plugins are left out: %s", str(error).splitlines()[0])
    return [rule for rule in (*BUILT_IN, *declared) if not rule.plugins or active & set(rule.plugins)]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _rows(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(dict(json.loads(line)))
        except (json.JSONDecodeError, TypeError, ValueError):
            continue  # cut off: the run was killed while it wrote
    return found


def _checkpoints(folder: Path) -> list[CheckpointFile]:
    found = []
    for path in sorted(folder.glob("[!.]*")):
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(CheckpointFile(path.name, size, datetime.fromtimestamp(path.stat().st_mtime, UTC)))
    return found
