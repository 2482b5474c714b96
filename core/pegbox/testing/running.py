"""Running a config in this process, or the command line in another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.plan import compose
from pegbox.run import execute
from pegbox.testing.fingerprint import changes, fingerprint, load_watched
from pegbox.testing.recorder import HookCall, HookRecorder

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Outcome

START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from pegbox.cli import main; main()"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        folder: what it wrote.
        calls: every hook call after composing, in order.
        foreign_changes: functions and methods of other packages that the run replaced; empty in a well-behaved run.
    """

    ctx: Context
    outcome: Outcome
    calls: Sequence[HookCall]
    foreign_changes: Sequence[str]

    @property
    def folder(self) -> Path:
        return self.ctx.folder

    def hooks(self) -> list[str]:
        """The names of the hooks that were called, in order."""
        return [call.hook for call in self.calls]


def run_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, instances: dict[str, object] | None = None
) -> RunResult:
    """Compose and run a config in this process; an error of the run is raised.

    Args:
        source: a YAML file, `recipe://name`, or a mapping.
        overrides: `key=value`, as on the command line.
        instances: ready plugins by name, used instead of installed ones.
    """
    ctx = compose(source, overrides, instances=instances)
    load_watched()
    before = fingerprint()
    with HookRecorder(ctx.kernel) as recorder:
        outcome = execute(ctx)
    return RunResult(ctx, outcome, tuple(recorder.calls), tuple(changes(before, fingerprint())))


def run_cli(
    *arguments: str | Path, folder: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `pegbox ARGUMENTS` in a process of its own that sees the same packages; nothing is raised if it fails.

    Args:
        folder: the current folder of the process.
    """
    import json

    command = [sys.executable, "-c", START, json.dumps(sys.path), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
