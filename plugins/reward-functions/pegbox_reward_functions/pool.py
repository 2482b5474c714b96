"""Processes that call reward functions, one call for the completions of one prompt.

Each worker is a process of its own whose main thread calls the functions: those that use signals (math-verify's
time-outs do) work. A call that hangs is killed with its process, and a new one takes its place. Workers die with the
process that started them, however that ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from pegbox.errors import RunError

if TYPE_CHECKING:
    from pegbox_reward_functions.config import RewardFunctionsConfig
    from pegbox_reward_functions.opening import Named

Given = dict[str, Any]
START_S = 300.0
"""A worker has so long to import the functions."""
SHOWN = 300
"""Characters of a prompt or completion that a message shows."""


@dataclass(frozen=True)
class Call:
    """Function number `function` for the completions of prompt number `group`.

    Attributes:
        given: all there is: `prompts`, `completions`, `completion_ids`, columns; a value for each completion.
        takes: the names of what the function takes.
    """

    group: int
    function: int
    given: Given
    takes: tuple[str, ...]


@dataclass
class Worker:
    """One process: `call` is what it works on."""

    process: subprocess.Popen[bytes]
    connection: Connection
    call: Call | None = None
    ready: bool = False
    until: float = field(default_factory=lambda: time.monotonic() + START_S)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class Crew:
    """Workers, started when there is something to do."""

    def __init__(self, rewards: Sequence[Named], config: RewardFunctionsConfig) -> None:
        self._rewards, self._config = rewards, config
        self._workers: list[Worker] = []

    def answers(self, calls: Sequence[Call]) -> dict[tuple[int, int], list[float | None]]:
        """The values of every call, by (group, function).

        Raises:
            RunError: a function raised, returned no rewards, took too long, or killed its process.
        """
        waiting = deque(calls)
        done: dict[tuple[int, int], list[float | None]] = {}
        try:
            while len(done) < len(calls):
                self._hand_out(waiting)
                for worker in self._heard():
                    call, values = worker.call, self._result(worker)
                    if call is not None and values is not None:
                        done[call.group, call.function] = values
        except BaseException:
            self.close()
            raise
        return done

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _hand_out(self, waiting: deque[Call]) -> None:
        self._workers = [worker for worker in self._workers if not self._died_idle(worker)]
        busy = sum(worker.call is not None for worker in self._workers)
        while len(self._workers) < min(self._config.workers, busy + len(waiting)):
            self._workers.append(_started(self._rewards))
        for worker in self._workers:
            if worker.ready and worker.call is None and waiting:
                worker.call = waiting.popleft()
                worker.until = time.monotonic() + self._config.timeout_s
                worker.connection.send((worker.call.function, worker.call.given, worker.call.takes))

    def _died_idle(self, worker: Worker) -> bool:
        if worker.call is None and worker.ready and worker.process.poll() is not None:
            worker.kill()
            return True
        return False

    def _heard(self) -> list[Worker]:
        """Workers that have said something, died, or are late."""
        busy = [worker for worker in self._workers if worker.call is not None or not worker.ready]
        left = min(worker.until for worker in busy) - time.monotonic()
        said = wait([worker.connection for worker in busy], timeout=max(0.0, left))
        return [worker for worker in busy if worker.connection in said or time.monotonic() >= worker.until]

    def _result(self, worker: Worker) -> list[float | None] | None:
        """The values that a worker answers with; None: it has become ready."""
        if not worker.connection.poll():
            return self._late(worker)
        try:
            kind, said = worker.connection.recv()
        except (EOFError, ConnectionError, pickle.UnpicklingError) as error:
            raise self._dead(worker) from error
        if kind == "failed":
            raise said
        if kind == "ready":
            worker.ready = True
            return None
        worker.call = None
        return list(said)

    def _late(self, worker: Worker) -> list[float | None]:
        call = worker.call
        self._workers.remove(worker)
        worker.kill()
        if call is None:
            raise RunError(
                f"a process for rewards was not ready after {START_S:.0f} s",
                "It imports the modules of the functions.",
                "See what they do when they are imported.",
            )
        if self._config.on_timeout == "none":
            return [None] * len(call.given["completions"])
        raise RunError(
            f"the reward '{self._rewards[call.function].name}' took more than {self._config.timeout_s:g} s for the "
            f"completions of {_prompt(call.given)}",
            "It hangs, or is slow; its process was killed.",
            "Set reward-functions.timeout_s higher, or on_timeout: none, which counts it as not applicable.",
        )

    def _dead(self, worker: Worker) -> RunError:
        code = worker.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        if worker.call is None:
            return RunError(
                f"a process for rewards ended with {how} before its first call",
                "Its messages stand above.",
                "See what the modules of the functions do when they are imported.",
            )
        return RunError(
            f"the reward '{self._rewards[worker.call.function].name}' ended its process with {how}, called with the "
            f"completions of {_prompt(worker.call.given)}",
            "A function that kills its process (or is killed for want of memory) gives no reward.",
            "Repair the function.",
        )


def _started(rewards: Sequence[Named]) -> Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        number = str(theirs.fileno())
        command = [sys.executable, "-m", "pegbox_reward_functions.worker", number, str(os.getpid())]
        # Of its own session: Ctrl-C reaches the run alone, which ends its workers.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True, env=_environment()
        )
    connection = Connection(ours.detach())
    worker = Worker(process, connection)
    try:
        connection.send(list(rewards))
    except Exception:
        worker.kill()
        raise
    return worker


def _environment() -> dict[str, str]:
    """That of this process, with the same places to find modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _prompt(given: Given) -> str:
    return f"the prompt {given['prompts'][0]!r:.{SHOWN}}"
