"""The guard of a server: whoever dies, nothing is left. The server here is a small program with a child of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pegbox.errors import RunError
from pegbox_rollout_vllm import guard
from pegbox_rollout_vllm.client import Client, ServerGone
from pegbox_rollout_vllm.config import RolloutVllmConfig
from pegbox_rollout_vllm.connection import Connection
from pegbox_rollout_vllm.options import Shape
from pegbox_rollout_vllm.server import OwnServer, free_port

TWO = "import os, time\nos.fork()\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(60)\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    limit = time.monotonic() + seconds
    while not holds() and time.monotonic() < limit:
        time.sleep(0.05)
    return holds()


def started(tmp_path: Path, program: str = TWO) -> tuple[OwnServer, Path]:
    config = RolloutVllmConfig(command=[sys.executable, "-u", "-c", program])
    server = OwnServer(config, Shape("base", None), "fp32", tmp_path / "server.log")
    server.start()
    return server, server.log


def numbers(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines() if line.isdigit()]


def test_stopping_ends_the_server_and_its_workers(tmp_path: Path) -> None:
    server, log = started(tmp_path)
    assert within(30, lambda: len(numbers(log)) == 2)
    pids = numbers(log)
    assert all(map(alive, pids))
    server.stop()
    assert not any(map(alive, pids))
    assert not server.alive


def test_a_killed_run_leaves_no_server(tmp_path: Path) -> None:
    """The run here is a process that starts a guard and sleeps."""
    run = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {guard.__file__!r}, str(os.getpid()), sys.executable, '-c', {TWO!r}],"
        " start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        assert within(30, lambda: not any(map(alive, pids)))


def test_a_killed_guard_takes_the_server_along(tmp_path: Path) -> None:
    server, log = started(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    assert within(30, lambda: len(numbers(log)) == 1)
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGKILL)
    assert within(30, lambda: not alive(numbers(log)[0]))


def test_workers_of_a_server_that_died_are_ended_and_its_last_lines_are_shown(tmp_path: Path) -> None:
    program = "import os, sys, time\nif os.fork() == 0:\n  print(os.getpid(), flush=True); time.sleep(60)\n"
    program += "time.sleep(0.5); sys.exit('no memory left')"
    server, log = started(tmp_path, program)
    connection = Connection(RolloutVllmConfig(start_timeout_s=20.0), server, logging.getLogger("test"))
    with pytest.raises(
        RunError, match=r"ended before it was ready. Its last lines:\n(.|\n)*\| no memory left"
    ) as error:
        connection.reach()
    assert str(log) in str(error.value)
    assert not alive(numbers(log)[0])


def test_a_server_that_is_not_there_is_gone_and_an_existing_one_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(ServerGone, match="ConnectionRefusedError"):
        Client(url, 5.0).get("/health")
    connection = Connection(RolloutVllmConfig(url=url, start_timeout_s=0.2), None, logging.getLogger("test"))
    with pytest.raises(RunError, match=r"no vLLM server answers at http://127.0.0.1:\d+"):
        connection.reach()
