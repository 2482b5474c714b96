"""A server that the run starts: its process, its log in the run's folder, and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.errors import RunError

from pegbox_rollout_vllm import guard
from pegbox_rollout_vllm.options import command, environment

if TYPE_CHECKING:
    from pegbox_rollout_vllm.config import RolloutVllmConfig
    from pegbox_rollout_vllm.options import Shape

LAST_LINES = 20
STOP_S = guard.GRACE_S + 5.0


class OwnServer:
    """One vLLM server under a guard (see guard.py). Its output goes to `log`, which is kept.

    Attributes:
        url: where it listens once it is ready.
    """

    def __init__(self, config: RolloutVllmConfig, shape: Shape, precision: str, log: Path) -> None:
        self._config, self._shape, self._precision = config, shape, precision
        self.log = log
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not ready yet."""
        port = self._config.port or free_port(self._config.host)
        words = command(self._config, self._shape, port, self._precision)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, str(Path(guard.__file__)), str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self._config),
                start_new_session=True,
            )
        self.url = f"http://{self._config.host}:{port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it and all its workers; done when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def died(self, when: str) -> RunError:
        """The error for a server that is gone, with its last words."""
        return RunError(
            f"the vLLM server that the run had started ended {when}. Its last lines:\n{self.last_lines()}",
            f"All of its output is in {self.log}.",
            "Mend what it says; a run that had saved a checkpoint goes on with resume=auto.",
        )

    def last_lines(self) -> str:
        """The end of its log."""
        if not self.log.is_file():
            return ""
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            return "".join(f"  | {line}" for line in deque(lines, LAST_LINES)).rstrip()


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
