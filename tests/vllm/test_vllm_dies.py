"""A server that is killed: the run starts its own again and goes on; somebody else's stops the run with an error."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import RunError
from rollout_runs import OWN, StartedRun, processes, server_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
Start = Callable[..., StartedRun]


def group(leader: int) -> list[int]:
    """Processes of a process group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == leader and not state.startswith("Z")]


def gone(pids: Callable[[], list[int]], within_s: float) -> bool:
    limit = time.monotonic() + within_s
    while pids() and time.monotonic() < limit:
        time.sleep(0.2)
    return not pids()


def test_a_server_of_our_own_that_is_killed_is_started_again_and_goes_on(started: Start, other_base: Path) -> None:
    run = started(model=other_base, **OWN)
    run.sync(0)
    run.learn(0, size=0.1)
    run.sync(1)
    wanted = {"samples": 8, "prompts": tuple((5 + index, 7) for index in range(32)), "max_tokens": 120}
    expected = run.generate(**wanted)
    guard, server = server_of(other_base, guarded=True), server_of(other_base)
    memory = sum(_resident(pid) for pid in group(guard))
    print(f"resident memory of the server's processes: {memory / 2**30:.2f} GiB")
    threading.Timer(0.3, os.kill, (server, signal.SIGKILL)).start()
    assert run.generate(**wanted) == expected
    assert not group(guard)
    assert server_of(other_base) != server
    run.learn(1, size=0.1)
    assert run.sync(2).version == 2
    second = server_of(other_base, guarded=True)
    os.kill(server_of(other_base), signal.SIGKILL)
    with pytest.raises(RunError, match=r"(?s)ended .*restarts allows no further start. Its last lines:"):
        run.generate()
    run.close()
    assert not group(second)
    assert not processes(str(other_base))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def test_somebody_elses_server_that_is_killed_stops_the_run(started: Start, wider_base: Path) -> None:
    host = started(model=wider_base, **{**OWN, "restarts": 0})
    host.sync(0)
    run = started(model=wider_base, url=host.vllm.client.url)
    run.sync(0)
    os.kill(server_of(wider_base), signal.SIGKILL)
    with pytest.raises(RunError, match=r"(?s)is gone.*\nThe run did not start it.*resume=auto") as error:
        run.generate()
    assert "Checkpoints that were saved are complete" in str(error.value)
    with pytest.raises(RunError, match=r"(?s)ended .*Its last lines:"):
        host.generate()


def test_no_process_is_left_behind_by_a_run_that_is_killed(base: Path, tmp_path: Path, recorded: Any) -> None:
    script = (
        "import json, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[3]);"
        "from rollout_runs import StartedRun;"
        "run = StartedRun(Path(sys.argv[2]), Path(json.load(open(sys.argv[1]))['base']), lora=True,"
        " **json.load(open(sys.argv[1]))['own']); print('started', flush=True); time.sleep(600)"
    )
    # A copy under another path, so that its server is not taken for one of another test.
    copied = tmp_path / "copied"
    shutil.copytree(base, copied)
    words = [sys.executable, "-c", script, str(recorded({"base": str(copied), "own": OWN})), str(tmp_path / "run")]
    with subprocess.Popen([*words, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "started\n"
            guard = server_of(copied, guarded=True)
            limit = time.monotonic() + 120
            while len(group(guard)) < 4 and time.monotonic() < limit:
                time.sleep(0.2)
            assert len(group(guard)) >= 4, "the server has workers by now"
        finally:
            run.kill()
    assert gone(lambda: group(guard), within_s=20)
    assert not processes(str(copied))


def test_a_server_that_does_not_come_up_is_an_error_with_its_last_words(started: Start) -> None:
    run = started(**{**OWN, "args": ["--no-such-option"]})
    with pytest.raises(RunError, match=r"(?s)ended before it was ready.*unrecognized arguments: --no-such-option"):
        run.sync(0)
