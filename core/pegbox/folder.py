"""The run's folder: what a run writes about itself, and the rule that nothing is overwritten silently.

`run.json` holds the plan (with every key of the config and its origin), versions, data fingerprints and the outcome;
`config.yaml` is the resolved config. Both are written whole or not at all.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pegbox.errors import did_you_mean, fail

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Checkpoint, CheckpointStore, Examples, Outcome

RECORD = "run.json"
CONFIG = "config.yaml"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "trl", "triton", "bitsandbytes", "vllm")


def claim(folder: Path, resume: str | None) -> None:
    """Refuse an output folder that already holds a run (unless it is to be resumed) or anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if resume not in (None, "auto"):
            raise fail("resume-nothing", resume=resume, folder=folder)
    elif not (folder / RECORD).is_file():
        problem = "holds other files" if folder.is_dir() else "is a file"
        raise fail("output-foreign", folder=folder, problem=problem, free=_free_name(folder))
    elif resume is None:
        raise fail("output-taken", folder=folder, free=_free_name(folder))


def _free_name(folder: Path) -> str:
    taken = {path.name for path in folder.parent.iterdir()}
    return f"{folder.parent.name}/{next(name for n in count(2) if (name := f'{folder.name}-{n}') not in taken)}"


def resume_point(store: CheckpointStore, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `resume` names; None starts from the beginning."""
    checkpoints = {checkpoint.path.name: checkpoint for checkpoint in store.list()}
    if resume is None or (resume == "auto" and not checkpoints):
        return None
    if resume == "auto":
        return list(checkpoints.values())[-1]
    if resume not in checkpoints:
        raise fail("resume-missing", resume=resume, hint=did_you_mean(resume, checkpoints, "Complete checkpoints:"))
    return checkpoints[resume]


@dataclass
class Record:
    """`run.json`, written when training begins and again when the run is exported; only rank 0 writes."""

    path: Path
    content: dict[str, Any]
    writes: bool

    @classmethod
    def open(cls, ctx: Context, train: Examples, held_out: Examples | None) -> Record:
        own = ["pegbox-core", *(active.origin.distribution for active in ctx.kernel.active.values())]
        splits = [rows for rows in (train, held_out) if rows is not None]
        content: dict[str, Any] = {
            "plan": ctx.plan.to_json(),
            "digest": ctx.plan.digest(),
            "versions": {"python": platform.python_version(), **versions([*own, *LIBRARIES])},
            "data": {rows.split: {"rows": len(rows), "fingerprint": rows.fingerprint} for rows in splits},
            "processor": ctx.processor.fingerprint,
            "world_size": ctx.runtime.world_size,
            "command": sys.argv,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "outcome": None,
        }
        record = cls(ctx.folder / RECORD, content, ctx.runtime.rank == 0)
        record._write()
        if record.writes:
            _replace(ctx.folder / CONFIG, yaml.safe_dump(ctx.config.resolved(), sort_keys=False, allow_unicode=True))
        ctx.runtime.barrier()
        return record

    def close(self, outcome: Outcome) -> None:
        """Add how the run ended."""
        self.content["outcome"] = {"reason": outcome.reason, "step": outcome.step, "metrics": dict(outcome.metrics)}
        self.content["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._write()

    def _write(self) -> None:
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, json.dumps(self.content, indent=1, default=str))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution that is installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError, ValueError):
            found[name] = version(name)
    return found
