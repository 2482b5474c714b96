"""Runs that are killed by SIGKILL, each in a process of its own that is forked after the imports.

`python killed_runs.py FOLDER` makes, in FOLDER:

    at_step          killed right after a step that follows a checkpoint
    in_save          killed while its second checkpoint is being written
    in_first_save    killed while its first checkpoint is being written
    again_and_again  killed after random times, and resumed, until it ends; it saves after each step
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pegbox_trainer.checkpoints
import pegbox_trainer.loop
import pegbox_trainer.runtime  # noqa: F401 - with all of these imported, a forked process trains at once
import torch
from pegbox.hooks import hookimpl
from safetensors.torch import load_file
from tiny_llama import build_model
from tiny_runs import run, tiny_config

STEPS = 16
KEYS: dict[str, Any] = {
    "max_steps": STEPS,
    "micro_batch": 3,
    "accumulation": 2,
    "log_every": 3,
    "eval_every": 4,
    "save_every": 5,
    "keep": None,
    "tiny": {"rows": 27, "eval_rows": 7, "dropout": 0.1},
}


class Killer:
    """Kills its own process: after a step, or in a checkpoint after a step, whose state it is asked for."""

    def __init__(self, after_step: int = 0, in_save_of_step: int = 0, tell: int | None = None) -> None:
        self._after_step, self._in_save, self._step, self._tell = after_step, in_save_of_step, 0, tell

    @hookimpl
    def on_event(self, event: Any) -> None:
        if type(event).__name__ == "RunStarted" and self._tell is not None:
            os.write(self._tell, b"!")
        if type(event).__name__ == "Stepped":
            self._step = event.step
            if event.step == self._after_step:
                os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, object]:
        if self._step == self._in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing to restore."""


def in_fork(action: Callable[[], object], meanwhile: Callable[[int], None] | None = None) -> int:
    """Do something in a forked process, whose id `meanwhile` gets; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            action()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if sys.exc_info()[0] is None else 1)
    if meanwhile is not None:
        meanwhile(child)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed on its own"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def train(folder: Path, killer: Killer, **keys: Any) -> None:
    run(tiny_config(folder, plugins=["killer"], **{**KEYS, **keys}), killer=killer)


def read_all(folder: Path) -> int:
    """Read every file of every complete checkpoint; how many there are."""
    complete = list((folder / "checkpoints").glob("step-*"))
    for path in complete:
        assert (path / "meta.json").is_file()
        load_file(path / "model.safetensors")
        for state in path.rglob("*.pt"):
            torch.load(state, weights_only=True)
    return len(complete)


def kill_until_it_ends(folder: Path) -> None:
    """A run that saves after each step, killed at random moments of its training; prints how often, and when.

    The moments lie in the first half of what a whole run takes here, so the first one always comes before its end.
    """
    source, kills, in_saves = random.Random(0), 0, 0
    hear, tell = os.pipe()
    began = [0.0]

    def listen(_child: int) -> None:
        os.read(hear, 1)
        began[0] = time.monotonic()

    in_fork(lambda: train(folder.with_name("timed"), Killer(tell=tell), save_every=1), listen)
    half_s = (time.monotonic() - began[0]) / 2

    def kill(child: int) -> None:
        os.read(hear, 1)
        time.sleep(source.uniform(0, half_s))
        os.kill(child, signal.SIGKILL)

    while in_fork(lambda: train(folder, Killer(tell=tell), save_every=1, resume="auto"), kill):
        kills += 1
        assert kills < 60, "the run makes no progress"
        in_saves += any((folder / "checkpoints").glob(".tmp-*"))
        read_all(folder)
    print(f"kills={kills} in_saves={in_saves} complete={read_all(folder)}")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    build_model()
    for name, killer in {
        "at_step": Killer(after_step=8),
        "in_save": Killer(in_save_of_step=10),
        "in_first_save": Killer(in_save_of_step=5),
    }.items():
        ended = in_fork(lambda name=name, killer=killer: train(root / name, killer))
        assert ended == signal.SIGKILL, name
    kill_until_it_ends(root / "again_and_again")
