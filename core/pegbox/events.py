"""Events of a run, as `on_event` receives them, and the signal that an observer may answer with."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.record import Record

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from pegbox.types import Checkpoint, Job, Model, Outcome


class Signal(enum.Flag):
    """What an observer asks of the loop; the answers of all observers and ranks are combined."""

    NONE = 0
    STOP = enum.auto()
    SAVE = enum.auto()
    EVAL = enum.auto()


class RunBegins(Record):
    """Nothing was read or written yet: what a plugin can see to be wrong, it should raise now and not hours later."""


class RunStarted(Record):
    """Everything is built; training begins or goes on at `step`."""

    job: Job
    step: int


class GradientsReady(Record):
    """Gradients of a step are complete and averaged; clipping comes next."""

    step: int
    model: Model
    optimizer: Optimizer


class Stepped(Record):
    """The optimizer made step number `step` (1 is the first). `loss` lies on the device: reading it waits for it."""

    step: int
    model: Model
    optimizer: Optimizer
    loss: Tensor


class Logged(Record):
    """Metrics were read from the device and written."""

    step: int
    metrics: Mapping[str, float]


class Evaluated(Record):
    """An evaluation ended. `model` is the one that was evaluated."""

    step: int
    model: Model
    metrics: Mapping[str, float]


class CheckpointSaved(Record):
    """A checkpoint is complete on disk."""

    checkpoint: Checkpoint


class RunFailed(Record):
    """The run stops with an error."""

    error: BaseException


class RunEnded(Record):
    """Training ended and what it made was exported."""

    outcome: Outcome
    folder: Path


Event = RunBegins | RunStarted | GradientsReady | Stepped | Logged | Evaluated | CheckpointSaved | RunFailed | RunEnded
