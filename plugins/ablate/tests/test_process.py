"""What is said of a run that breaks, ends too soon, or would report itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from ablated_config import tiny
from pegbox_ablate.ablation import ablate
from pegbox_ablate.process import Failure, measure
from pegbox_ablate.report import text
from pegbox_ablate.variants import Variant, check, measured

PLUGIN = """
import os
from pegbox.events import RunBegins, Signal, Stepped
from pegbox.hooks import hookimpl


class Plugin:
    best_effort = {best_effort}

    @hookimpl
    def on_event(self, event):
        if isinstance(event, {event}):
            {act}
"""


def failure(folder: Path, steps: int, event: str, act: str) -> Failure:
    """A run with one more plugin that acts on an event."""
    (folder / "acting.py").write_text(PLUGIN.format(best_effort=False, event=event, act=act))
    data = tiny()
    data["plugins"].insert(0, "./acting.py")
    quiet = measured(data, check(data, folder), 1)
    found = measure(Variant(None, quiet, folder), folder / "run", steps, 1)
    assert isinstance(found, Failure)
    return found


def test_an_error_of_the_run_is_told_in_one_line_and_its_last_lines_kept(tmp_path: Path) -> None:
    found = failure(tmp_path, 6, "RunBegins", "raise MemoryError('no room\\n for it')")
    assert (found.refused, found.what) == (False, "MemoryError: no room")
    assert "in plugin 'acting' (file acting.py), hook on_event" in found.log


def test_a_process_that_is_killed_is_told_apart(tmp_path: Path) -> None:
    found = failure(tmp_path, 6, "RunBegins", "os.kill(os.getpid(), 9)")
    assert found.what == "the run's process was ended by SIGKILL: the machine may have run out of memory"


def test_a_run_that_stops_too_soon_is_not_measured_and_exports_nothing(tmp_path: Path) -> None:
    found = failure(tmp_path, 6, "Stepped", "return Signal.STOP if event.step == 3 else None")
    assert (found.refused, found.what) == (False, "the run stopped at step 3, before step 6")
    assert found.next == "Type: --steps 3 --warmup 1"
    assert not list(tmp_path.rglob("exported"))


def test_a_run_that_is_shorter_than_the_measurement_is_refused(tmp_path: Path) -> None:
    found = failure(tmp_path, 40, "RunBegins", "pass")
    assert (found.refused, found.what) == (True, "the run has 30 steps, and 40 are to be measured")
    assert found.next.startswith("Type: --steps 30 --warmup 10")


def test_a_plugin_that_only_reports_a_run_is_in_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "telling.py").write_text(PLUGIN.format(best_effort=True, event="RunBegins", act="raise SystemExit"))
    data = tiny()
    data["plugins"].append("./telling.py")
    (tmp_path / "config.yaml").write_text(str(data).replace("'", '"'))
    monkeypatch.chdir(tmp_path)
    made = ablate("config.yaml", folder=tmp_path / "runs", only=["telling"])
    assert made.loggers == ("telling",)
    assert text(made).splitlines()[-1].startswith("telling: in none of the runs")
    assert not (tmp_path / "runs").exists()
