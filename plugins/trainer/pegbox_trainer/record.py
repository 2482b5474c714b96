"""What a run writes about itself, so that it can be explained and repeated after it ended.

`run.json` holds the plan (with every key of the config and where it came from), the versions, the fingerprints of
the data, and how the run ended; `config.yaml` is the resolved config, which runs from anywhere. Each is written whole
or not at all.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pegbox.folder import RECORD
from pegbox.rows import ExampleStream

from pegbox_trainer.resuming import refuse_changes

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Job, Outcome

CONFIG = "config.yaml"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "trl", "triton", "bitsandbytes", "vllm")


@dataclass
class RunRecord:
    """`run.json`: written when training begins, and again when the run ends; rank 0 writes."""

    path: Path
    content: dict[str, Any]
    writes: bool

    @classmethod
    def open(cls, ctx: Context, job: Job) -> RunRecord:
        """Write what is known before the first step; a run that goes on must have the settings it began with."""
        if job.resume is not None:
            refuse_changes(ctx, ctx.folder / RECORD)
        own = ["pegbox-core", *(active.origin.distribution for active in ctx.kernel.active.values())]
        rows = [source.examples for source in (job.train, job.eval) if source is not None]
        content: dict[str, Any] = {
            "plan": ctx.plan.to_json(),
            "digest": ctx.plan.digest(),
            "versions": {"python": platform.python_version(), **versions([*own, *LIBRARIES])},
            "data": {split.split: {"rows": _count(split), "fingerprint": split.fingerprint} for split in rows},
            "processor": ctx.processor.fingerprint,
            "world_size": ctx.runtime.world_size,
            "command": sys.argv,
            "started": _now(),
            "outcome": None,
        }
        record = cls(ctx.folder / RECORD, content, ctx.runtime.rank == 0)
        if record.writes:
            ctx.folder.mkdir(parents=True, exist_ok=True)
            # First: a folder without it is not taken for a run's, and could not be resumed after a kill.
            record._write()
            resolved = yaml.safe_dump(ctx.config.record(ctx.folder), sort_keys=False, allow_unicode=True)
            _replace(ctx.folder / CONFIG, resolved)
        return record

    def close(self, outcome: Outcome) -> None:
        """Add how the run ended."""
        ended = {"reason": outcome.reason, "step": outcome.step, "metrics": dict(outcome.metrics)}
        self.content |= {"outcome": ended, "ended": _now()}
        self._write()

    def _write(self) -> None:
        if self.writes:
            _replace(self.path, json.dumps(self.content, indent=1, default=str) + "\n")


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution that is installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError, ValueError):
            found[name] = version(name)
    return found


def _count(rows: Dataset) -> int | None:
    """How many rows; None for a stream, of which nobody knows."""
    return None if isinstance(rows, ExampleStream) else len(rows)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
