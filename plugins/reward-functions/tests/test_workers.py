"""Processes that score end when the run ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from reward_texts import context, rollouts, scored

RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from pegbox import hooks
from reward_texts import context, rollouts
ctx = context(Path(sys.argv[1]), "./slow.py:tells")
ctx.each(hooks.score_rollouts, ctx, rollouts(({"prompt": "a"}, ["1"])))
"""
SLOW = """
import os, time
def tells(completions):
    print(f"worker {os.getpid()}", flush=True)
    while True: time.sleep(0.05)
"""


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(process: int, within_s: float = 5.0) -> bool:
    until = time.monotonic() + within_s
    while alive(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(process)


def test_workers_end_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os\ndef whose(completions): return [os.getpid()]\n", encoding="utf-8")
    batch = rollouts(({"prompt": "a"}, ["1"]))
    values = scored(context(tmp_path, "./mine.py:whose"), batch)["whose"]
    assert gone(int(values[0] or 0))


def test_a_worker_that_was_killed_between_two_calls_is_replaced(tmp_path: Path) -> None:
    from pegbox import hooks

    (tmp_path / "mine.py").write_text("import os\ndef whose(completions): return [os.getpid()]\n", encoding="utf-8")
    batch = rollouts(({"prompt": "a"}, ["1"]))
    ctx = context(tmp_path, "./mine.py:whose")
    with ctx.exit:
        first = ctx.each(hooks.score_rollouts, ctx, batch)[0][1][0].values_R[0]
        assert ctx.each(hooks.score_rollouts, ctx, batch)[0][1][0].values_R[0] == first
        os.kill(int(first), signal.SIGKILL)
        time.sleep(0.1)
        assert ctx.each(hooks.score_rollouts, ctx, batch)[0][1][0].values_R[0] != first


def test_no_worker_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    command = [sys.executable, "-c", RUN, str(tmp_path), str(Path(__file__).parent)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    try:
        line = next(line for line in run.stderr if line.startswith("worker"))
        worker = int(line.split()[1])
        assert alive(worker)
        run.kill()
        run.wait()
        assert gone(worker)
    finally:
        run.kill()
        run.wait()
        run.stderr.close()
