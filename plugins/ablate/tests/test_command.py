"""What `pegbox ablate` refuses and says, and that it leaves nothing behind when it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from ablated_config import tiny
from pegbox_ablate.process import ended_by_signals

Typed = Callable[..., tuple[int, str, str]]
WAITS = """
import os, subprocess, sys, time
from pathlib import Path
from pegbox.events import RunBegins
from pegbox.hooks import hookimpl


class Plugin:
    @hookimpl
    def on_event(self, event):
        if isinstance(event, RunBegins):
            worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            file = Path(__file__).with_name("pids")
            file.with_suffix(".new").write_text(f"{os.getpid()} {worker.pid}")
            file.with_suffix(".new").replace(file)
            time.sleep(60)
"""


def test_steps_that_are_all_warmup_are_refused(typed: Typed) -> None:
    code, _, err = typed(tiny(), "--steps", "4")
    assert code == 2
    assert "--steps 4 and --warmup 4 leave no step to be timed" in err
    assert "Type: --steps 12 --warmup 4" in err


def test_only_names_plugins_of_the_config(typed: Typed) -> None:
    code, _, err = typed(tiny("idle"), "--only", "idel")
    assert code == 2
    assert "--only names 'idel', which is not active in this config" in err
    assert "Did you mean 'idle'?" in err


def test_a_file_that_cannot_be_written_is_refused_at_the_beginning(typed: Typed, tmp_path: Path) -> None:
    code, _, err = typed(tiny("idle"), "--json", str(tmp_path / "nowhere" / "a.json"))
    assert code == 2
    assert "Name a file in a folder that exists." in err


def test_a_launcher_of_several_processes_is_refused(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = typed(tiny("idle"))
    assert code == 2
    assert "started by a launcher of several processes" in err


def test_a_config_that_is_no_run_is_the_error_of_its_plan(typed: Typed) -> None:
    config = tiny()
    config["plugins"].remove("sft")
    code, _, err = typed(config)
    assert code == 2
    assert "no active plugin owns build_loss" in err


def test_what_cannot_be_left_out_is_listed_with_its_reason(typed: Typed) -> None:
    code, out, _ = typed(tiny("idle"), "--only", "sft,trainer")
    assert code == 0
    assert out.splitlines()[-2:] == [
        "sft: needed: no active plugin owns build_loss",
        "trainer: needed: no active plugin owns build_runtime",
    ]


def test_a_run_that_refuses_with_all_plugins_is_the_error(typed: Typed, tmp_path: Path) -> None:
    config = tiny("asks_for_idle")
    code, _, err = typed(config)
    assert code == 2
    assert "idle is not there, and somebody asks for it" in err


def _as_from_a_terminal() -> None:
    """Signals that whoever started the tests ignores, as nohup does, would be ignored in the command, too."""
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_DFL)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """`pegbox ablate` while its first run is being made: its process, those it started, its temporary folder."""
    config = tiny("idle")
    (tmp_path / "waits.py").write_text(WAITS)
    config["plugins"].insert(0, "./waits.py")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pegbox", "ablate", "config.yaml", "--only", "idle"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_as_from_a_terminal,
    )
    pids: list[int] = []
    try:
        assert until(lambda: (tmp_path / "pids").is_file() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        pids += map(int, (tmp_path / "pids").read_text().split())
        assert list((tmp_path / "temporary").iterdir())
        yield process, pids, tmp_path / "temporary"
    finally:
        for pid in [process.pid, *pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def until(done: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux what became of processes")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_when_it_is_ended(ending: signal.Signals, started) -> None:
    process, pids, temporary = started
    process.send_signal(ending)
    process.communicate(timeout=30)
    assert process.returncode in (1, 130)
    assert all(gone(pid) for pid in pids)
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux what became of processes")
def test_its_runs_end_with_it_when_it_is_killed(started) -> None:
    process, pids, _ = started
    process.kill()
    process.communicate(timeout=30)
    assert until(lambda: all(gone(pid) for pid in pids))


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
